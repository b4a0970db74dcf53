// Generates text over gRPC; needs Node.js 18 or later, `npm ci` in this folder, and the .proto files of this repository.
//
// node examples/node/generate.mjs 127.0.0.1:8001 "What is the capital of France?"

import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const [address, question] = process.argv.slice(2);
if (!address || !question) {
  console.error("usage: node generate.mjs HOST:PORT QUESTION");
  process.exit(2);
}

const protos = fileURLToPath(new URL("../../proto", import.meta.url));
const definition = loadSync("twostroke_proto/v1/inference.proto", { includeDirs: [protos], enums: String, defaults: true });
const { twostroke } = grpc.loadPackageDefinition(definition);
const client = new twostroke.v1.Inference(address, grpc.credentials.createInsecure());

const request = {
  chat: { messages: [{ role: "user", content: question }] },
  sampling: { temperature: 0, maxTokens: 64 },
};
// The call's deadline is the request's: a number of milliseconds from now.
const stream = client.Generate(request, { deadline: Date.now() + 60_000 });
stream.on("data", (response) => {
  process.stdout.write(response.text);
  if (response.usage) {
    console.log(`\n(${response.usage.promptTokens} tokens in, ${response.usage.completionTokens} out)`);
  }
});
stream.on("error", (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
stream.on("end", () => client.close());
