/** What a file that is not a `.bstk` file seems to be. */

const STARTS = [
  ["version https://git-lfs", "a Git LFS pointer; fetch the file itself with git lfs pull"],
  ["GGUF", "a GGUF file"],
  ["PK\x03\x04", "a zip archive"],
  ["\x28\xb5\x2f\xfd", "zstd data; decompress it first"],
  ["\x1f\x8b", "gzip data; decompress it first"],
];

/** Return the message for a file that starts with `bytes`. */
export function guess(bytes) {
  if (!bytes.length) return "the file is empty, not a .bstk file";
  const start = String.fromCharCode(...bytes.subarray(0, 64));
  const found = STARTS.find(([mark]) => start.startsWith(mark));
  if (found) return `not a .bstk file but ${found[1]}`;
  if (/^\x89?\??BSTK[\n\r]/.test(start)) return "a .bstk file that was changed in transfer; transfer it as binary, not as text";
  const text = start.trimStart().toLowerCase();
  if (text.startsWith("<!doctype html") || text.startsWith("<html")) return "not a .bstk file but a web page";
  if (text.startsWith("{")) return "not a .bstk file but JSON";
  if (start[8] === "{") return "not a .bstk file but a safetensors file";
  const found8 = Array.from(bytes.subarray(0, 8), (byte) => byte.toString(16).padStart(2, "0")).join(" ");
  return `not a .bstk file: it starts with ${found8}, not with 89 42 53 54 4b 0d 0a 1a`;
}
