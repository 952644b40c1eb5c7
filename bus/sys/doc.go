// Package sys is what unibus asks of nats-server itself: which connections there
// are, to close one, and to hint one client that it should connect again. It
// goes by what account CTRL imports of SYS (deploy/nats, accounts.conf), and
// knows the server's wire forms so that nobody else needs to.
//
// Whose connection may stay is none of its business.
package sys
