// What both programs share: the command line, the connection, and how messages look in JavaScript.
"use strict";

const fs = require("fs");
const path = require("path");
const { parseArgs } = require("util");
const grpc = require("@grpc/grpc-js");

// Fields as the proto files name them; 64-bit numbers and bytes (base64) as strings, as in protobuf's JSON.
exports.FORM = { keepCase: true, longs: String, enums: String, bytes: String };

// [options, positional arguments]; every program takes --address and --tls besides its own.
exports.commandLine = (own = {}) => {
  const common = { address: { type: "string", default: "127.0.0.1:50051" }, tls: { type: "string" } };
  const { values, positionals } = parseArgs({ options: { ...common, ...own }, allowPositionals: true });
  return [values, positionals];
};

// Arguments of a client's constructor. `tls` is a directory with tls.crt, tls.key and ca.crt; without it: plaintext.
exports.connection = ({ address, tls }) => {
  if (!tls) return [address, grpc.credentials.createInsecure(), {}];
  const read = (name) => fs.readFileSync(path.join(tls, name));
  const credentials = grpc.credentials.createSsl(read("ca.crt"), read("tls.key"), read("tls.crt"));
  // Actors are called by address; their certificates name a role.
  return [address, credentials, { "grpc.ssl_target_name_override": "actor.outrider" }];
};

exports.deadline = (seconds = 60) => ({ deadline: Date.now() + 1000 * seconds });
