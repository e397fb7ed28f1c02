// A question about an image, from the proto files: upload the image, name it by its sha256, read the stream.
//
//   node ask.js --image digit.png "Which digit?"
"use strict";

const crypto = require("crypto");
const fs = require("fs");
const path = require("path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const { FORM, commandLine, connection, deadline } = require("./connect");

const CHUNK_BYTES = 512 * 1024;
const PROTO = path.resolve(__dirname, "../../../proto");

const definition = loader.loadSync("rollout/v1/rollout.proto", { ...FORM, includeDirs: [PROTO] });
const { RolloutService } = grpc.loadPackageDefinition(definition).rollout.v1;

async function main() {
  const [options, [question]] = commandLine({ image: { type: "string" }, n: { type: "string", default: "1" } });
  const client = new RolloutService(...connection(options));
  const parts = [{ text: question }];
  const media = [];
  if (options.image) {
    media.push({ modality: "MODALITY_IMAGE", sha256: await upload(client, fs.readFileSync(options.image)) });
    parts.unshift({ media_index: 0 });
  }
  const call = client.Generate(
    {
      group_id: `ask-${crypto.randomUUID()}`,
      chat: { messages: [{ role: "user", parts }] },
      media,
      sampling: { n: Number(options.n), max_tokens: 256 },
      returns: { text: true },
    },
    deadline(),
  );
  for await (const { completions } of call) {
    for (const { text } of completions?.items ?? []) console.log(text);
  }
  client.close();
}

// Store a file on the actor, in chunks; its hash.
function upload(client, file) {
  const sha256 = crypto.createHash("sha256").update(file).digest();
  return new Promise((resolve, reject) => {
    const call = client.PutMedia(deadline(), (error) => (error ? reject(error) : resolve(sha256)));
    for (let start = 0; start < file.length; start += CHUNK_BYTES) {
      const chunk = file.subarray(start, start + CHUNK_BYTES);
      call.write(start ? { chunk } : { sha256, num_bytes: file.length, chunk });
    }
    call.end();
  });
}

main().catch((error) => {
  console.error(`ask: ${error.message}`);
  process.exitCode = 1;
});
