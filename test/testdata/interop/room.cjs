// A member of rooms that shares no code with unibus: stock nats.js, node's own
// crypto, and npm @noble/ciphers and @noble/post-quantum for XChaCha20-Poly1305
// and X-Wing. It knows docs/protocol.md (subjects, durable rooms),
// docs/encryption.md and the RFCs that these name, and nothing else. TestInterop
// runs it.
//
//   node room.cjs MODULES < request.json > answer.json
//
// Bytes are base64.
//
// {"op":"talk","url","ca","seed_file","room","durable","say":[...],"hear":n} -> {"heard":[{"sender","topic","data"}],"seqs":[...]}
// {"op":"encryption_key","seed_file","n","created_at"}                       -> {"public","signature"}
// {"op":"open_envelope","room","roster","newest","seed_file","n","envelope"} -> {"data"}
// {"op":"seal_envelope","room","roster","key","seed_file","user","n","public"} -> {"data"}
// {"op":"open","room","key","roster","sender","topic","message"}             -> {"data"}
// {"op":"seal","room","key","roster","seed_file","topic","data"}             -> {"data"}
// {"op":"open_file","room","key","roster","name","file"}                     -> {"data","sender"}
// {"op":"seal_file","room","key","roster","seed_file","name","data"}         -> {"data"}
"use strict";
const crypto = require("node:crypto");
const fs = require("node:fs");
const path = require("node:path");
const modules = path.resolve(process.argv[2], "node_modules");
const { xchacha20poly1305 } = require(path.join(modules, "@noble/ciphers/chacha.js"));
const { ml_kem768_x25519: xwing } = require(path.join(modules, "@noble/post-quantum/hybrid.js"));

const bytes = (s) => Buffer.from(s, "base64");
const text = (s) => Buffer.from(s, "latin1");
const sha256 = (...parts) => parts.reduce((h, p) => h.update(p), crypto.createHash("sha256")).digest();
const hmac = (key, ...parts) => parts.reduce((h, p) => h.update(p), crypto.createHmac("sha256", key)).digest();
function u64(n) {
  const b = Buffer.alloc(8);
  b.writeBigUInt64BE(BigInt(n));
  return b;
}
function u16(n) {
  const b = Buffer.alloc(2);
  b.writeUInt16BE(n);
  return b;
}
function expand(key, info, length) { // HKDF-Expand
  const out = [];
  for (let i = 1, last = Buffer.alloc(0); i * 32 < length + 32; i++) {
    last = hmac(key, last, info, Buffer.from([i]));
    out.push(last);
  }
  return Buffer.concat(out).subarray(0, length);
}

// HPKE (RFC 9180), base mode, one message: the key schedule of section 5.1.
const suite = Buffer.concat([text("HPKE"), u16(0x647a), u16(0x0001), u16(0x0003)]);
const labeledExtract = (salt, label, ikm) => hmac(salt, text("HPKE-v1"), suite, text(label), ikm);
const labeledExpand = (prk, label, info, length) => expand(prk, Buffer.concat([u16(length), text("HPKE-v1"), suite, text(label), info]), length);
function schedule(shared, info) {
  const none = Buffer.alloc(0);
  const context = Buffer.concat([Buffer.from([0]), labeledExtract(none, "psk_id_hash", none), labeledExtract(none, "info_hash", info)]);
  const secret = labeledExtract(shared, "secret", none);
  return [labeledExpand(secret, "key", context, 32), labeledExpand(secret, "base_nonce", context, 12)];
}
const encapsulated = 1120;
function hpkeSeal(pub, info, plain) {
  const { cipherText, sharedSecret } = xwing.encapsulate(pub);
  const [key, nonce] = schedule(sharedSecret, info);
  const c = crypto.createCipheriv("chacha20-poly1305", key, nonce, { authTagLength: 16 });
  return Buffer.concat([cipherText, c.update(plain), c.final(), c.getAuthTag()]);
}
function hpkeOpen(secret, info, sealed) {
  const [key, nonce] = schedule(xwing.decapsulate(sealed.subarray(0, encapsulated), secret), info);
  const c = crypto.createDecipheriv("chacha20-poly1305", key, nonce, { authTagLength: 16 });
  c.setAuthTag(sealed.subarray(-16));
  return Buffer.concat([c.update(sealed.subarray(encapsulated, -16)), c.final()]);
}

const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
function seedOf(file) { // the 32 bytes in SU...
  const out = [];
  let bits = 0, value = 0;
  for (const c of fs.readFileSync(file, "utf8").trim()) {
    value = ((value << 5) | alphabet.indexOf(c)) & 0xfff;
    bits += 5;
    if (bits >= 8) {
      bits -= 8;
      out.push((value >> bits) & 0xff);
    }
  }
  return Buffer.from(out).subarray(2, 34);
}
function identity(file) {
  const key = crypto.createPrivateKey({ key: Buffer.concat([Buffer.from("302e020100300506032b657004220420", "hex"), seedOf(file)]), format: "der", type: "pkcs8" });
  const user = crypto.createPublicKey(key).export({ format: "der", type: "spki" }).subarray(12);
  return { user, sign: (data) => crypto.sign(null, data, key) };
}
function verify(user, data, signature) {
  const key = crypto.createPublicKey({ key: Buffer.concat([Buffer.from("302a300506032b6570032100", "hex"), user]), format: "der", type: "spki" });
  if (!crypto.verify(null, data, key, signature)) throw new Error("wrong signature");
}

const roomOf = (req) => Buffer.concat([Buffer.from([req.room.length]), text(req.room)]);
function rosterOf(req, raw = req.roster) { // which one it follows is not looked at here
  const body = bytes(raw).subarray(0, -64);
  let at = 0;
  const take = (n) => {
    if (at + n > body.length) throw new Error("the roster is too short");
    return body.subarray(at, (at += n));
  };
  const domain = text("unibus/v1/roster\0"), room = roomOf(req);
  if (!take(domain.length).equals(domain) || !take(room.length).equals(room)) throw new Error("another room's roster");
  const r = { hash: sha256(body), epoch: take(8).readBigUInt64BE(), previous: take(32), createdAt: take(8), commitment: take(32), signer: take(32), members: new Map() };
  r.owner = (user) => r.members.get(user.toString("hex"))?.role === 3;
  const kind = take(1)[0];
  if (kind > 1) throw new Error("a roster of an unknown kind");
  if (kind === 1) take(96); // the admin whom a reader must have pinned, and what they signed
  let last = Buffer.alloc(32);
  for (let n = take(4).readUInt32BE(); n > 0; n--) {
    const user = take(32), [role] = take(1), m = { role, n: take(8).readBigUInt64BE(), hash: take(32) };
    if (user.compare(last) <= 0 || role < 1 || role > 3) throw new Error("no sorted list of members");
    r.members.set((last = user).toString("hex"), m);
  }
  if (at !== body.length || !r.owner(r.signer)) throw new Error("not a roster of an owner");
  verify(r.signer, body, bytes(raw).subarray(-64));
  return r;
}
function derived(req, purpose, epoch) {
  return expand(bytes(req.key), Buffer.concat([text("unibus/v1/" + purpose + "\0"), roomOf(req), u64(epoch)]), 32);
}

function encryptionKey(req) {
  const info = Buffer.concat([text("unibus/v1/encryption-seed\0"), u64(req.n)]);
  const secret = Buffer.from(crypto.hkdfSync("sha256", seedOf(req.seed_file), "", info, 32));
  return { secret, pub: Buffer.from(xwing.getPublicKey(secret)) };
}
function publishedKey(req) {
  const me = identity(req.seed_file), { pub } = encryptionKey(req);
  const signature = me.sign(Buffer.concat([text("unibus/v1/encryption-key\0"), me.user, u64(req.n), u64(req.created_at), pub]));
  return { public: pub.toString("base64"), signature: signature.toString("base64") };
}

function envelopeContext(req, roster, to, n, hash, sender) {
  return Buffer.concat([roomOf(req), u64(roster.epoch), roster.hash, roster.commitment, to, u64(n), hash, sender]);
}
const envelopeInfo = (context) => Buffer.concat([text("unibus/v1/room-key\0"), context]);
const envelopeSigned = (context, sealed) => Buffer.concat([text("unibus/v1/envelope\0"), context, sha256(sealed)]);
function rightKey(req, roster, key) {
  if (!derived({ ...req, key: key.toString("base64") }, "commitment", roster.epoch).equals(roster.commitment)) throw new Error("not the key of the roster");
  return key;
}
function sealEnvelope(req) {
  const me = identity(req.seed_file), roster = rosterOf(req), to = Buffer.from(req.user, "hex"), pub = bytes(req.public), hash = sha256(pub);
  const context = envelopeContext(req, roster, to, req.n, hash, me.user);
  const sealed = hpkeSeal(pub, envelopeInfo(context), rightKey(req, roster, bytes(req.key)));
  return Buffer.concat([Buffer.from([1]), me.user, u64(req.n), sealed, me.sign(envelopeSigned(context, sealed))]);
}
function openEnvelope(req) {
  const raw = bytes(req.envelope), me = identity(req.seed_file), roster = rosterOf(req), newest = rosterOf(req, req.newest);
  const sender = raw.subarray(1, 33), sealed = raw.subarray(41, -64), { secret, pub } = encryptionKey(req), hash = sha256(pub);
  if (raw.length !== 1273 || raw[0] !== 1 || raw.readBigUInt64BE(33) !== BigInt(req.n)) throw new Error("not an envelope for this key");
  if (!roster.owner(sender) && !newest.owner(sender)) throw new Error("from nobody who may give the key");
  const named = roster.members.get(me.user.toString("hex"));
  if (named && (named.n !== BigInt(req.n) || !named.hash.equals(hash))) throw new Error("the roster names another key of ours");
  const context = envelopeContext(req, roster, me.user, req.n, hash, sender);
  verify(sender, envelopeSigned(context, sealed), raw.subarray(-64));
  return rightKey(req, roster, hpkeOpen(secret, envelopeInfo(context), sealed));
}

function messageData(req, roster, sender, header) {
  return Buffer.concat([text("unibus/v1/message\0"), roomOf(req), roster.hash, sender, u16(req.topic.length), text(req.topic), header]);
}
function seal(req) {
  const me = identity(req.seed_file), roster = rosterOf(req), nonce = crypto.randomBytes(24);
  const header = Buffer.concat([Buffer.from([1]), u64(roster.epoch), crypto.randomBytes(16), u64(1), u64(Date.now()), nonce]);
  const data = messageData(req, roster, me.user, header), payload = bytes(req.data);
  const signature = me.sign(Buffer.concat([data, payload]));
  const sealed = xchacha20poly1305(derived(req, "message-key", roster.epoch), nonce, data).encrypt(Buffer.concat([signature, payload]));
  return Buffer.concat([header, sealed]);
}
function open(req) {
  const raw = bytes(req.message), roster = rosterOf(req), header = raw.subarray(0, 65), sender = Buffer.from(req.sender, "hex");
  if (header[0] !== 1 || header.readBigUInt64BE(1) !== roster.epoch) throw new Error("another epoch");
  const data = messageData(req, roster, sender, header);
  const plain = Buffer.from(xchacha20poly1305(derived(req, "message-key", roster.epoch), header.subarray(41), data).decrypt(raw.subarray(65)));
  verify(sender, Buffer.concat([data, plain.subarray(64)]), plain.subarray(0, 64));
  return plain.subarray(64);
}

const chunk = 65536;
function fileKeys(req, roster, header) {
  const data = Buffer.concat([text("unibus/v1/file\0"), roomOf(req), roster.hash, u16(req.name.length), text(req.name), header]);
  const keys = expand(derived(req, "file-key", roster.epoch), data, 64);
  return { data, key: keys.subarray(0, 32), mac: keys.subarray(32) };
}
const position = (i, last) => Buffer.concat([u64(i), Buffer.from([last ? 1 : 0])]);
function sealFile(req) {
  const me = identity(req.seed_file), roster = rosterOf(req), content = bytes(req.data);
  const header = Buffer.concat([Buffer.from([1]), u64(roster.epoch), me.user, crypto.randomBytes(32), u64(Date.now())]);
  const { data, key, mac } = fileKeys(req, roster, header);
  const chunks = [];
  for (let i = 0; i === 0 || i * chunk < content.length; i++) {
    const plain = content.subarray(i * chunk, (i + 1) * chunk), where = position(i, (i + 1) * chunk >= content.length);
    const nonce = hmac(mac, where, plain).subarray(0, 24);
    chunks.push(nonce, Buffer.from(xchacha20poly1305(key, nonce, where).encrypt(plain)));
  }
  return Buffer.concat([header, ...chunks, me.sign(Buffer.concat([data, sha256(...chunks)]))]);
}
function openFile(req) {
  const raw = bytes(req.file), roster = rosterOf(req), header = raw.subarray(0, 81), sender = header.subarray(9, 41);
  if (header[0] !== 1 || header.readBigUInt64BE(1) !== roster.epoch) throw new Error("another epoch");
  const { data, key, mac } = fileKeys(req, roster, header);
  const sealed = raw.subarray(81, -64), out = [];
  for (let i = 0; i * (chunk + 40) < sealed.length; i++) {
    const part = sealed.subarray(i * (chunk + 40), (i + 1) * (chunk + 40)), where = position(i, (i + 1) * (chunk + 40) >= sealed.length);
    const plain = Buffer.from(xchacha20poly1305(key, part.subarray(0, 24), where).decrypt(part.subarray(24)));
    if (!hmac(mac, where, plain).subarray(0, 24).equals(part.subarray(0, 24))) throw new Error("wrong nonce");
    out.push(plain);
  }
  verify(sender, Buffer.concat([data, sha256(sealed)]), raw.subarray(-64));
  return { data: Buffer.concat(out).toString("base64"), sender: sender.toString("hex") };
}

async function talk(req) {
  const { connect, nkeyAuthenticator, headers } = require(path.join(modules, "@nats-io/transport-node"));
  const { fromSeed } = require(path.join(modules, "@nats-io/nkeys"));
  const seed = Buffer.from(fs.readFileSync(req.seed_file, "utf8").trim());
  const me = fromSeed(seed).getPublicKey();
  const nc = await connect({ servers: req.url, tls: { caFile: req.ca }, authenticator: nkeyAuthenticator(seed), inboxPrefix: "_INBOX_" + me });
  const heard = [], seqs = [];
  const sub = nc.subscribe((req.durable ? "feed." : "room.") + req.room + ".>");
  const listening = (async () => {
    for await (const m of sub) {
      const [, , sender, ...topic] = m.subject.split(".");
      heard.push({ sender, topic: topic.join("."), data: Buffer.from(m.data).toString("base64") });
      if (heard.length >= req.hear) break;
    }
  })();
  await nc.flush();
  for (const [i, said] of req.say.entries()) {
    const subject = "room." + req.room + "." + me + ".from.node";
    if (!req.durable) {
      nc.publish(subject, said);
      continue;
    }
    const h = headers();
    h.set("Unibus-Msg-Id", crypto.randomBytes(12).toString("hex"));
    for (let tries = 0; ; tries++) { // under the same id: it is stored once
      try {
        const answer = (await nc.request(subject, said, { headers: h, timeout: 3000 })).json();
        if (answer.seq) {
          seqs.push(answer.seq);
          break;
        }
        if (answer.code !== "unavailable" || tries > 10) throw new Error(JSON.stringify(answer));
      } catch (err) {
        if (tries > 10) throw err;
      }
    }
  }
  await nc.flush();
  process.stderr.write("said\n");
  await listening;
  await nc.close();
  return { heard, seqs };
}

async function main() {
  const req = JSON.parse(fs.readFileSync(0, "utf8"));
  const ops = {
    talk, encryption_key: publishedKey,
    open_envelope: (r) => ({ data: openEnvelope(r).toString("base64") }), seal_envelope: (r) => ({ data: sealEnvelope(r).toString("base64") }),
    open: (r) => ({ data: open(r).toString("base64") }), seal: (r) => ({ data: seal(r).toString("base64") }),
    open_file: openFile, seal_file: (r) => ({ data: sealFile(r).toString("base64") }),
  };
  process.stdout.write(JSON.stringify(await ops[req.op](req)));
}
main().catch((err) => { console.error(err); process.exit(1); });
