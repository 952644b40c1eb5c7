// Package recorder keeps durable rooms: it takes what members publish, has a
// quorum store it, and tells the sender where.
//
// JetStream never listens to a subject that users publish to, and never sees a
// reply or a header of theirs: one hostile header would freeze a room's stream
// for good, and a reply subject would let the server speak in a foreign room.
// So a recorder stands between them, on every node in one queue group. It copies
// payload, message id and the headers that are ours, from room.<room>.<U>.> to
// store.<room>.<U>.>, and answers only into the sender's own inbox.
//
// Who may send is looked up again for each message, under the lease, with a hold
// on the sender until the message is stored or given up: a change that takes the
// right away returns when nothing of theirs can land any more. Without a lease a
// recorder leaves the queue group, and others record.
//
// Nothing is ever answered as stored that a quorum does not hold. A message
// without an answer may or may not be stored: its sender repeats it under the
// same id, and the stream knows it for two minutes. The recorder itself repeats
// nothing, so that it changes no order.
//
// Memory is bounded by limits on what is under way, in one room and in all; who
// is over them is told to come back.
package recorder
