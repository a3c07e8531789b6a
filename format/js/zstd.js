/** Decoding, by the zstd of Node's zlib or by a function that the caller hands in. */

import { DamagedError, MissingZstdError, ResourceError } from "./errors.js";
import { FrameCheck } from "./frames.js";
import { checkPayload } from "./payloads.js";

const MOST = 2 ** 31 - 1; // bytes in one piece, in the engines of today

/** Return Node's decoder (22.15, 23.8 and later), or null. */
function builtIn() {
  const zlib = globalThis.process?.getBuiltinModule?.("node:zlib");
  if (!zlib?.zstdDecompressSync) return null;
  return (frame, rawLength) => zlib.zstdDecompressSync(frame, { maxOutputLength: rawLength });
}

/** Return `given`, or Node's decoder; throw a MissingZstdError where there is neither. */
export function decoder(given) {
  const found = given ?? builtIn();
  if (found) return found;
  throw new MissingZstdError(
    "decoding chunks needs zstd: Node 22.15 or newer, or the option zstd, a function (frame, rawLength) => Uint8Array. "
      + "Opening, checking digests and cutting work without",
  );
}

/** Refuse, before it is read, a chunk that cannot be held in one piece. */
export function checkHoldable(chunk) {
  if (Math.max(chunk.storedLength, chunk.rawLength) > MOST) {
    throw new ResourceError(`${chunk.where}: it has ${chunk.rawLength} bytes; ${MOST} can be decoded in JavaScript`);
  }
}

/** Return the raw bytes of a chunk whose stored bytes match its digest, checked. */
export async function decode(chunk, stored, zstd) {
  const check = new FrameCheck(chunk.where, chunk.rawLength);
  check.push(stored);
  check.end();
  let raw;
  try {
    raw = await zstd(stored, chunk.rawLength);
  } catch (cause) {
    throw new DamagedError(`${chunk.where}: its zstd frame does not decode (${cause.message})`, { cause });
  }
  if (raw.length !== chunk.rawLength) {
    throw new DamagedError(`${chunk.where}: it decodes to ${raw.length} bytes; its raw length is ${chunk.rawLength}`);
  }
  checkPayload(chunk, raw);
  return raw;
}
