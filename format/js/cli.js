#!/usr/bin/env node
/** A small command over the reader. Exit codes: docs/guide.md. */

import { existsSync } from "node:fs";
import { parseArgs } from "node:util";

import { BstkError, UsageError, open } from "./bstk.js";
import { openPath, writeCut } from "./node.js";

const HELP = `usage: node cli.js inspect FILE|URL [--root HEX] [--strict]
       node cli.js verify FILE|URL [--contents] [--root HEX] [--strict]
       node cli.js truncate FILE|URL --mb N -o OUT [--no-seal] [--force] [--root HEX] [--strict]`;

const OPTIONS = {
  root: { type: "string" },
  strict: { type: "boolean" },
  contents: { type: "boolean" },
  mb: { type: "string" },
  output: { type: "string", short: "o" },
  "no-seal": { type: "boolean" },
  force: { type: "boolean" },
  help: { type: "boolean", short: "h" },
};

const COMMANDS = {
  inspect: (file) => ({
    state: file.state, file_bytes: file.length, memory_bytes: file.memoryBytes, full_bytes: file.fullLength,
    base_bytes: file.baseLength, chunks: file.chunks.length, root: file.root,
  }),
  verify: (file, { contents }) => file.verify({ contents }),
  async truncate(file, { mb, output, force, "no-seal": noSeal }) {
    if (mb === undefined || output === undefined) throw new UsageError(`truncate needs --mb N and -o OUT\n${HELP}`);
    if (existsSync(output) && !force) throw new UsageError(`${output}: exists; --force replaces it`);
    const { chunks, memoryBytes } = file.fit(mb);
    return { file_bytes: await writeCut(file, output, mb, { seal: !noSeal }), memory_bytes: memoryBytes, chunks };
  },
};

async function main(args) {
  const { values, positionals } = parse(args);
  if (values.help) return console.log(HELP);
  const [command, from, ...rest] = positionals;
  if (!Object.hasOwn(COMMANDS, command ?? "") || from === undefined || rest.length) throw new UsageError(HELP);
  const { root, strict } = values;
  const options = { root, strict, warn: (words) => console.error(`warning: ${words}`) };
  const file = await (/^https?:\/\//i.test(from) ? open(from, options) : openPath(from, options));
  try {
    console.log(JSON.stringify(await COMMANDS[command](file, values), null, 2));
  } finally {
    await file.close();
  }
}

function parse(args) {
  try {
    return parseArgs({ args, options: OPTIONS, allowPositionals: true });
  } catch (cause) {
    throw new UsageError(`${cause.message}\n${HELP}`, { cause });
  }
}

main(process.argv.slice(2)).catch((error) => {
  if (!(error instanceof BstkError)) throw error;
  console.error(`error: ${error.message}`);
  process.exitCode = error.exitCode;
});
