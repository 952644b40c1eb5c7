// A member of rooms that shares no code with unibus: stock nats.js, node's own
// crypto, and npm @noble/ciphers for XChaCha20-Poly1305. It knows
// docs/protocol.md (subjects, durable rooms) and docs/encryption.md (messages,
// files), and nothing else. TestInterop runs it.
//
//   node room.cjs MODULES < request.json > answer.json
//
// Bytes are base64.
//
// {"op":"talk","url","ca","seed_file","room","durable","say":[...],"hear":n} -> {"heard":[{"sender","topic","data"}],"seqs":[...]}
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
function rosterOf(req) { // who may be in it is not looked at here
  const body = bytes(req.roster).subarray(0, -64);
  const at = text("unibus/v1/roster\0").length;
  const room = roomOf(req);
  if (!body.subarray(at, at + room.length).equals(room)) throw new Error("another room's roster");
  return { hash: sha256(body), epoch: body.readBigUInt64BE(at + room.length) };
}
function derived(req, purpose, epoch) {
  return expand(bytes(req.key), Buffer.concat([text("unibus/v1/" + purpose + "\0"), roomOf(req), u64(epoch)]), 32);
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
    talk, open: (r) => ({ data: open(r).toString("base64") }), seal: (r) => ({ data: seal(r).toString("base64") }),
    open_file: openFile, seal_file: (r) => ({ data: sealFile(r).toString("base64") }),
  };
  process.stdout.write(JSON.stringify(await ops[req.op](req)));
}
main().catch((err) => { console.error(err); process.exit(1); });
