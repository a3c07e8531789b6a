/** Does the jobs of javascript_reader.py: a list in JSON on stdin, a list of results on stdout. */

import { createHash, randomBytes } from "node:crypto";
import { openAsBlob, readFileSync } from "node:fs";

import { open } from "../../format/js/bstk.js";
import { openPath } from "../../format/js/node.js";
import { Sha256, sha256 } from "../../format/js/sha256.js";

const digest = (bytes) => createHash("sha256").update(bytes).digest("hex");

/** Return what `work` returns, or the class and words of the error that it throws. */
async function outcome(work) {
  try {
    return await work();
  } catch (error) {
    return { error: error.name, message: error.message, exit: error.exitCode };
  }
}

/** How a file can be given, each by the name that a job uses for it. */
const OPEN = {
  path: (job, options) => openPath(job.path, options),
  bytes: (job, options) => open(readFileSync(job.path), options),
  blob: async (job, options) => open(await openAsBlob(job.path), options),
  url: (job, options) => open(job.url, options),
};

/** A decoder that asks the test's server, or none. */
function zstdOf(url) {
  return url && (async (frame) => {
    const answer = await fetch(url, { method: "POST", body: frame });
    if (!answer.ok) throw new Error(await answer.text());
    return new Uint8Array(await answer.arrayBuffer());
  });
}

async function examine(job) {
  const warnings = [];
  const options = { root: job.root, strict: job.strict, zstd: zstdOf(job.zstd), warn: (words) => warnings.push(words) };
  const file = await OPEN[job.from ?? "path"](job, options);
  const result = { state: file.state, root: file.root, warnings: warnings.length, memory: file.memoryBytes, metadata: file.metadata };
  if (job.content) {
    result.content = [];
    for (const c of file.chunks) {
      const raw = await outcome(async () => digest(await file.read(c)));
      result.content.push([c.name, c.kindCode, c.level, c.shape, c.dtype, c.rank, c.transposed, c.importance, c.error, raw]);
    }
  }
  if (job.verify) result.verify = await outcome(() => file.verify());
  if (job.contents) result.contents = await outcome(() => file.verify({ contents: true }));
  result.cuts = [];
  for (const [mb, seal] of job.cuts ?? []) {
    result.cuts.push(await outcome(async () => digest(new Uint8Array(await (await file.cut(mb, { seal })).arrayBuffer()))));
  }
  result.requests = file.requests; // with those of the cuts
  await file.close();
  return result;
}

/** The streaming SHA-256 against the one of the platform, fed in pieces of every length. */
async function digests() {
  for (let length = 0; length < 300; length++) {
    const bytes = randomBytes(length);
    const ours = new Sha256();
    for (let at = 0; at < length; at += 1 + (length % 67)) ours.update(bytes.subarray(at, Math.min(length, at + 1 + (length % 67))));
    if (ours.hex() !== digest(bytes) || (await sha256(bytes)) !== digest(bytes)) return { length };
  }
  return "same";
}

const results = [];
for (const job of JSON.parse(readFileSync(0, "utf8"))) results.push(await outcome(() => (job.digests ? digests() : examine(job))));
console.log(JSON.stringify(results));
