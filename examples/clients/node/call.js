// Any call of any service, knowing nothing but what the server's reflection tells.
//
//   node call.js weights.v1.WeightService/GetStatus
//   node call.js rollout.v1.RolloutService/Generate '{"group_id": "g", "text": "hello"}'
//   node call.js < lines        one call a line: {"method": ..., "messages": [...], "take": 1}
//
// Each call is answered by one line: its code, its messages, and the bytes of google.rpc.Status if it failed. `take`
// ends a stream after so many messages.
"use strict";

const readline = require("readline");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const { FORM, commandLine, connection, deadline } = require("./connect");

const REFLECTION = require.resolve("@grpc/reflection/build/proto/grpc/reflection/v1alpha/reflection.proto");

class AnyClient {
  constructor(options) {
    this.connection = connection(options);
    const { ServerReflection } = grpc.loadPackageDefinition(loader.loadSync(REFLECTION, FORM)).grpc.reflection.v1alpha;
    this.reflection = new ServerReflection(...this.connection);
    this.clients = new Map();
  }

  async call({ method, messages = [], take = Infinity }) {
    const [service, name] = method.split("/");
    const client = await this.clientOf(service);
    const { requestStream } = client.constructor.service[name];
    return new Promise((resolve) => {
      const answer = { method, messages: [] };
      const done = ({ code, details, metadata }) => {
        const [status] = metadata?.get("grpc-status-details-bin") ?? [];
        resolve({ ...answer, code: grpc.status[code], details, status: status?.toString("base64") });
      };
      const single = (error, message) => (error ? done(error) : (answer.messages.push(message), done({ code: 0 })));
      const { responseStream } = client.constructor.service[name];
      const argumentsOf = requestStream ? [deadline()] : [messages[0] ?? {}, deadline()];
      const call = client[name](...argumentsOf, ...(responseStream ? [] : [single]));
      if (responseStream) {
        call.on("data", (message) => {
          if (answer.messages.push(message) >= take) call.cancel();
        });
        call.on("error", () => {}); // it comes as the status, too
        call.on("status", done);
      }
      if (requestStream) {
        for (const message of messages) call.write(message);
        call.end();
      }
    });
  }

  // A client of a service by its full name.
  async clientOf(service) {
    if (!this.clients.has(service)) {
      const definition = loader.loadFileDescriptorSetFromBuffer(await this.filesOf(service), FORM);
      const Client = grpc.makeClientConstructor(definition[service], service);
      this.clients.set(service, new Client(...this.connection));
    }
    return this.clients.get(service);
  }

  // The files that define it, as a serialized FileDescriptorSet: each is field 1, with its length.
  filesOf(service) {
    return new Promise((resolve, reject) => {
      const call = this.reflection.ServerReflectionInfo(deadline());
      call.on("error", reject);
      call.on("data", ({ file_descriptor_response: found, error_response: error }) => {
        if (error) return reject(new Error(error.error_message));
        const files = found.file_descriptor_proto.map((file) => Buffer.from(file, "base64"));
        resolve(Buffer.concat(files.flatMap((file) => [Buffer.from([0x0a, ...varint(file.length)]), file])));
      });
      call.write({ file_containing_symbol: service });
      call.end();
    });
  }
}

function varint(number) {
  return number < 0x80 ? [number] : [(number & 0x7f) | 0x80, ...varint(number >> 7)];
}

async function main() {
  const [options, [method, message = "{}"]] = commandLine();
  const client = new AnyClient(options);
  const lines = method
    ? [JSON.stringify({ method, messages: [JSON.parse(message)] })]
    : readline.createInterface({ input: process.stdin });
  for await (const line of lines) console.log(JSON.stringify(await client.call(JSON.parse(line))));
  process.exit(); // connections would keep it
}

main().catch((error) => {
  console.error(`call: ${error.message}`);
  process.exit(1);
});
