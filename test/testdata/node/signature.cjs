// A client of the signature profile unibus-v1 (docs/protocol.md section 7.1)
// that shares no code with unibus: npm http-message-signatures and node's own
// crypto. TestSignatureInterop runs it.
//
//   node signature.cjs MODULES < request.json > answer.json
//
// {"op":"sign","seed_file","method","url","body":base64,"created"?,"nonce"?} -> {"headers","base"}
// {"op":"verify","key","method","url","headers"}                             -> {"verified"}
"use strict";
const crypto = require("node:crypto");
const fs = require("node:fs");
const path = require("node:path");
const { httpbis } = require(path.resolve(process.argv[2], "node_modules", "http-message-signatures"));

const fields = ["@method", "@authority", "@path", "@query", "content-digest"];
const params = ["created", "nonce", "keyid", "alg", "tag"];

// An nkey is base32 of a prefix (one byte, two for a seed), 32 bytes and a CRC-16.
const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
function base32(text) {
  const out = [];
  let bits = 0, value = 0;
  for (const c of text) {
    const digit = alphabet.indexOf(c);
    if (digit < 0) throw new Error("not base32");
    value = ((value << 5) | digit) & 0xfff;
    bits += 5;
    if (bits >= 8) {
      bits -= 8;
      out.push((value >> bits) & 0xff);
    }
  }
  return Buffer.from(out);
}
function encode32(bytes) {
  let out = "", bits = 0, value = 0;
  for (const b of bytes) {
    value = ((value << 8) | b) & 0xfff;
    bits += 8;
    while (bits >= 5) {
      bits -= 5;
      out += alphabet[(value >> bits) & 31];
    }
  }
  if (bits > 0) out += alphabet[(value << (5 - bits)) & 31];
  return out;
}
function crc16(bytes) { // XMODEM, as nkeys has it
  let crc = 0;
  for (const b of bytes) {
    crc ^= b << 8;
    for (let i = 0; i < 8; i++) crc = crc & 0x8000 ? ((crc << 1) ^ 0x1021) & 0xffff : (crc << 1) & 0xffff;
  }
  return crc;
}
function privateKey(seed) { // PKCS #8
  const raw = base32(seed).subarray(2, 34);
  return crypto.createPrivateKey({ key: Buffer.concat([Buffer.from("302e020100300506032b657004220420", "hex"), raw]), format: "der", type: "pkcs8" });
}
function publicKey(nkey) { // SubjectPublicKeyInfo
  const raw = base32(nkey).subarray(1, 33);
  return crypto.createPublicKey({ key: Buffer.concat([Buffer.from("302a300506032b6570032100", "hex"), raw]), format: "der", type: "spki" });
}
function nkeyOf(key) {
  const raw = crypto.createPublicKey(key).export({ format: "der", type: "spki" }).subarray(12);
  const body = Buffer.concat([Buffer.from([20 << 3]), raw]); // 20 << 3 spells U
  const crc = crc16(body);
  return encode32(Buffer.concat([body, Buffer.from([crc & 0xff, crc >> 8])]));
}

async function sign(req) {
  const key = privateKey(fs.readFileSync(req.seed_file, "utf8").trim());
  const digest = crypto.createHash("sha256").update(Buffer.from(req.body, "base64")).digest("base64");
  let base;
  const signed = await httpbis.signMessage({
    name: "ub1",
    key: { id: nkeyOf(key), alg: "ed25519", sign: async (data) => { base = data; return crypto.sign(null, data, key); } },
    fields,
    params,
    paramValues: {
      created: req.created ? new Date(req.created * 1000) : new Date(),
      nonce: req.nonce || crypto.randomBytes(16).toString("base64url"),
      tag: "unibus-v1",
    },
  }, { method: req.method, url: req.url, headers: { "Content-Digest": `sha-256=:${digest}:` } });
  return { headers: signed.headers, base: base.toString() };
}

async function verify(req) {
  const verified = await httpbis.verifyMessage({
    keyLookup: async (p) => p.keyid !== req.key ? null : {
      id: req.key, algs: ["ed25519"], verify: async (data, signature) => crypto.verify(null, data, publicKey(req.key), signature),
    },
    requiredFields: fields,
    requiredParams: params,
    tolerance: 60,
    all: true,
  }, { method: req.method, url: req.url, headers: req.headers });
  return { verified: verified === true };
}

const request = JSON.parse(fs.readFileSync(0, "utf8"));
({ sign, verify })[request.op](request).then(
  (answer) => process.stdout.write(JSON.stringify(answer) + "\n"),
  (error) => { process.stderr.write(`${error.stack}\n`); process.exitCode = 1; },
);
