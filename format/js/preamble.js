/** The preamble (SPEC.md, section 2), the root digest, and the preamble of a cut. */

import { DamagedError, NotBstkError, TruncatedError, UnsupportedVersionError } from "./errors.js";
import { guess } from "./guess.js";
import { sha256 } from "./sha256.js";

export const PREAMBLE_LENGTH = 256;
export const RECORD_LENGTH = 128;
const MAGIC = [0x89, 0x42, 0x53, 0x54, 0x4b, 0x0d, 0x0a, 0x1a];
const KNOWN_INCOMPATIBLE = 0b11111n;
const MAX = { fullLength: 2n ** 48n, chunkCount: 2 ** 21, namesLength: 2n ** 27n, metadataLength: 2n ** 22n };

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n;
});

/** Return the CRC-32 of zlib of a Uint8Array. */
export function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = (crc >>> 8) ^ CRC_TABLE[(crc ^ byte) & 255];
  return ~crc >>> 0;
}

/**
 * Check and parse the first 256 bytes, in the order of section 11 up to the limits.
 *
 * Lengths and offsets come as Numbers: all are at most 2^48 once they are checked. Flag words and the seal, which is
 * checked against the file's length only later, come as BigInts.
 *
 * @param {Uint8Array} bytes the first 256 bytes, or all of a shorter file
 */
export function parsePreamble(bytes) {
  const magic = bytes.subarray(0, 8);
  if (!bytes.length || !magic.every((byte, i) => byte === MAGIC[i])) throw new NotBstkError(guess(bytes));
  if (bytes.length < PREAMBLE_LENGTH) {
    throw new TruncatedError(`the file ends inside its preamble: ${bytes.length} bytes found, at least 256 needed`);
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, PREAMBLE_LENGTH);
  const u16 = (at) => view.getUint16(at, true);
  const u32 = (at) => view.getUint32(at, true);
  const u64 = (at) => view.getBigUint64(at, true);
  const [major, minor, preambleLength] = [u16(8), u16(10), u32(12)];
  const version = `version ${major}.${minor}; this reader reads 1.x`;
  // Only a preamble of 256 bytes ends in its CRC there; that of a newer version may be longer.
  if (preambleLength !== PREAMBLE_LENGTH) {
    if (major !== 1) throw new UnsupportedVersionError(version);
    throw new DamagedError(`preamble: its length is ${preambleLength}; it must be ${PREAMBLE_LENGTH}`);
  }
  const found = crc32(bytes.subarray(0, 252));
  if (found !== u32(252)) throw new DamagedError(`preamble: its CRC-32 is ${found}, and ${u32(252)} is written there`);
  if (major !== 1) throw new UnsupportedVersionError(version);
  const incompatible = u64(16);
  if (incompatible & ~KNOWN_INCOMPATIBLE) {
    const unknown = (incompatible & ~KNOWN_INCOMPATIBLE).toString(16);
    throw new UnsupportedVersionError(`incompatible flags 0x${unknown} are set, which this reader does not know`);
  }
  const must = (holds, what) => {
    if (!holds) throw new DamagedError(`preamble: ${what}`);
  };
  const exactly = (field, found, wanted) => must(found === wanted, `the ${field} is ${found}; it must be ${wanted}`);
  const within = (field, found, low, high) =>
    must(found >= low && found <= high, `the ${field} is ${found}; allowed: ${low} to ${high}`);

  const [fullLength, baseLength] = [u64(40), u64(56)];
  const [chunkCount, baseCount] = [u32(64), u32(68)];
  const [namesLength, metadataLength] = [u64(96), u64(112)];
  within("full length", fullLength, 0n, MAX.fullLength);
  within("chunk count", chunkCount, 1, MAX.chunkCount);
  within("base count", baseCount, 1, chunkCount);
  within("names length", namesLength, 1n, MAX.namesLength);
  within("metadata length", metadataLength, 2n, MAX.metadataLength);
  const namesOffset = BigInt(PREAMBLE_LENGTH + RECORD_LENGTH * chunkCount);
  const headerLength = namesOffset + namesLength + metadataLength;
  exactly("index offset", u64(72), BigInt(PREAMBLE_LENGTH));
  exactly("index length", u64(80), BigInt(RECORD_LENGTH * chunkCount));
  exactly("names offset", u64(88), namesOffset);
  exactly("metadata offset", u64(104), namesOffset + namesLength);
  within("base length", baseLength, headerLength + 1n, fullLength);
  must(bytes.subarray(216, 252).every((byte) => byte === 0), "a reserved byte is not 0");

  return {
    major, minor, incompatible, readOnlyCompatible: u64(24), compatible: u64(32), seal: u64(48),
    fullLength: Number(fullLength), baseLength: Number(baseLength), chunkCount, baseCount,
    namesOffset: Number(namesOffset), metadataOffset: Number(namesOffset + namesLength), headerLength: Number(headerLength),
    indexDigest: bytes.slice(120, 152), namesDigest: bytes.slice(152, 184), metadataDigest: bytes.slice(184, 216),
  };
}

/** Return "whole", "partial" or "sealed" for a file of `length` bytes (section 3). */
export function stateOf(preamble, length) {
  const { seal, fullLength, baseLength } = preamble;
  if (seal) {
    if (seal !== BigInt(length)) {
      throw new DamagedError(`the file was sealed at ${seal} bytes and has ${length}; fetch it again`);
    }
    if (length < baseLength || length > fullLength) {
      throw new DamagedError(`sealed at ${length} bytes; allowed: ${baseLength} to ${fullLength}`);
    }
    return "sealed";
  }
  if (length > fullLength) {
    throw new DamagedError(`the file has ${length} bytes, ${length - fullLength} more than it says; something was appended`);
  }
  if (length < baseLength) {
    throw new TruncatedError(
      `the file ends before its base model: ${length} bytes found, at least ${baseLength} needed; fetch more of it`,
    );
  }
  return length === fullLength ? "whole" : "partial";
}

/** Return the root digest of a preamble of 256 bytes, 64 hexadecimal digits. */
export function rootDigest(bytes) {
  return sha256(bytes.slice(0, 252).fill(0, 48, 56));
}

/** Return a preamble of 256 bytes with another seal, 0 for none, and its CRC-32. */
export function withSeal(bytes, seal) {
  const copy = bytes.slice(0, PREAMBLE_LENGTH);
  const view = new DataView(copy.buffer);
  view.setBigUint64(48, BigInt(seal), true);
  view.setUint32(252, crc32(copy.subarray(0, 252)), true);
  return copy;
}
