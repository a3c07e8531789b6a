/** The index and the stacks (SPEC.md, sections 4 to 7). */

import { DamagedError } from "./errors.js";
import { isPlainPath } from "./names.js";
import { RECORD_LENGTH } from "./preamble.js";
import { hex } from "./sha256.js";

const DTYPES = ["none", "f32", "f16", "bf16", "f64", "i8", "u8", "i16", "i32", "i64", "bool"];
const DTYPE_BYTES = [0, 4, 2, 2, 8, 1, 1, 2, 4, 8, 1];
const MAX_RAW = 2n ** 31n;
const MAX_FILES = 2 ** 28;
const MAX_DIMENSION = 2 ** 31 - 1;
const ceil = (a, b) => Math.ceil(a / b);

/**
 * For each kind: whether it is a block, the kinds that the chunk below it in its stack may be of (`on`; "" stands for none,
 * the kind may be first), the incompatible flag that it needs, and `rule(record)`, which returns the raw length that the
 * rest of the record asks for, or a text that says what is wrong.
 *
 * Numbers suffice: a product past 2^53 loses digits, but never falls back to the 2^31 that a raw length can be.
 */
const BLOCKS = ["sign", "trellis", "spqr", "outliers", "trellis5"];
const KINDS = new Map([
  [1, { name: "file", on: [""], rule: ({ shape, dtype, rank, rawLength }) =>
    shape.length || dtype !== "none" || rank ? "a file has no shape, dtype or rank" : rawLength }],
  [2, { name: "tensor", on: [""], rule: ({ shape, dtype, rank }) =>
    dtype === "none" || rank ? "a tensor has a dtype and no rank"
      : shape.reduce((product, n) => product * n, DTYPE_BYTES[DTYPES.indexOf(dtype)]) }],
  [3, { name: "sign", block: true, on: ["", "sign"], rule: ({ shape: [m, n], rank }) =>
    rank < 1 || rank > Math.min(m, n) ? `rank ${rank}; allowed: 1 to ${Math.min(m, n)}`
      : m * ceil(n, 8) + 2 * rank * (m + n) }],
  [4, { name: "trellis", block: true, on: ["", "trellis", "spqr", "outliers"], rule: ({ shape: [m, n], rank }) =>
    rank !== 2 ? `rank ${rank}; a trellis block has 2` : (m + 3) * ceil(n, 4) + 2 * m }],
  [5, { name: "spqr", block: true, on: [""], narrow: true, flag: 1n, rule: ({ shape: [m, n], rank }) => {
    const bits = [3, 4].find((b) => [16, 32, 64, 128].includes(rank - b));
    if (!bits) return `rank ${rank}; allowed: 16, 32, 64 or 128, plus 3 or 4`;
    const group = rank - bits;
    return 64 * ceil(2 * n, 64) + ceil(m, 16) * ceil(n, group) * (2 * bits * group + 20);
  } }],
  [6, { name: "outliers", block: true, on: ["spqr"], narrow: true, flag: 2n, rule: ({ shape: [m, n], rank, rawLength }) => {
    if (rank) return `rank ${rank}; an outliers block has 0`;
    const values = (rawLength - 4 * (m + 1)) / 4;
    return Number.isInteger(values) && values >= 0 && values <= m * n ? rawLength
      : `raw length ${rawLength} is not that of 0 to ${m} x ${n} values`;
  } }],
  [7, { name: "trellis5", block: true, on: ["", "trellis5", "spqr", "outliers"], flag: 4n, rule: ({ shape: [m, n], rank }) =>
    rank !== 2 ? `rank ${rank}; a trellis5 block has 2` : (m + 4) * ceil(n, 4) + 2 * m }],
  [8, { name: "exact", restores: true, on: BLOCKS, flag: 8n, rule: ({ shape, dtype, rank, rawLength }) => {
    if (shape.length !== 2 || !["f32", "f16", "bf16"].includes(dtype) || rank) return "an exact chunk has two dimensions, dtype f32, f16 or bf16 and rank 0";
    const [m, n] = shape;
    const least = 260 + m + m * n;
    return rawLength >= least && rawLength <= least + 4 * m * n ? rawLength : `raw length ${rawLength}; allowed: ${least} to ${least + 4 * m * n}`;
  } }],
  [9, { name: "original", restores: true, on: [""], flag: 16n, rule: ({ shape, dtype, rank, rawLength }) =>
    shape.length || dtype !== "none" || rank ? "an original has no shape, dtype or rank" : rawLength }],
]);

/** Return all records of the complete file as chunks, checked; `names` are those of the names table. */
export function parseRecords(index, names, preamble) {
  const view = new DataView(index.buffer, index.byteOffset, index.length);
  const chunks = [];
  const stacks = names.map(() => null); // the last chunk of each name
  let used = 0;
  let offset = preamble.headerLength;
  let flags = 0n;
  let files = 0;
  let restoring = false;
  for (let number = 0; number < preamble.chunkCount; number++) {
    const chunk = parseRecord(view, number, names, offset, preamble.fullLength);
    const must = (holds, what) => holds || fail(chunk.where, what);
    const { restores } = KINDS.get(chunk.kindCode);
    must(restores || !restoring, "after an exact or original chunk there are no other kinds");
    must(!restores || number >= preamble.baseCount, "an exact or original chunk stands in the base model");
    restoring ||= restores;
    must(chunk.nameId <= used, `name id ${chunk.nameId} is not in order of first use; allowed: 0 to ${used}`);
    const before = stacks[chunk.nameId];
    if (!before) {
      used++;
      must(restores || number < preamble.baseCount, "its name begins after the base model");
    }
    checkStack(chunk, before, must);
    if (chunk.kind === "file") files += chunk.rawLength;
    must(files <= MAX_FILES, `raw length ${chunk.rawLength}; all files together take at most ${MAX_FILES}`);
    stacks[chunk.nameId] = chunk;
    flags |= KINDS.get(chunk.kindCode).flag ?? 0n;
    offset = chunk.end;
    chunks.push(chunk);
  }
  const must = (holds, what) => holds || fail("index", what);
  must(used === names.length, `${names.length - used} names are not used`);
  must(offset === preamble.fullLength, `the last chunk ends at ${offset}, and the full length is ${preamble.fullLength}`);
  const end = chunks[preamble.baseCount - 1].end;
  must(end === preamble.baseLength,
    `the base model ends at ${end}, and the base length is ${preamble.baseLength}`);
  must(flags === preamble.incompatible,
    `its kinds need the incompatible flags 0x${flags.toString(16)}, and 0x${preamble.incompatible.toString(16)} are set`);
  return chunks;
}

function parseRecord(view, number, names, expected, fullLength) {
  const at = number * RECORD_LENGTH;
  const u8 = (position) => view.getUint8(at + position);
  const u16 = (position) => view.getUint16(at + position, true);
  const u32 = (position) => view.getUint32(at + position, true);
  const u64 = (position) => view.getBigUint64(at + position, true);
  const nameId = u32(0);
  const where = `chunk ${number}${nameId < names.length ? ` (${JSON.stringify(names[nameId])})` : ""} at offset ${u64(8)}`;
  const must = (holds, what) => holds || fail(where, what);

  must(nameId < names.length, `name id ${nameId}; there are ${names.length} names`);
  must(u64(8) === BigInt(expected), `it must start at ${expected}`);
  const [stored, raw] = [u64(16), u64(24)];
  must(stored >= 1n && stored <= BigInt(fullLength - expected), `stored length ${stored}; it must end within ${fullLength}`);
  must(raw >= 1n && raw <= MAX_RAW, `raw length ${raw}; allowed: 1 to ${MAX_RAW}`);
  must(raw <= 2n ** 20n + 1024n * stored, `raw length ${raw} is too much for ${stored} stored bytes`);
  const kind = KINDS.get(u16(4));
  must(kind, `kind ${u16(4)} is not known, and no flag announces it`);
  const ndim = u8(49);
  must(ndim <= 4, `${ndim} dimensions; allowed: 0 to 4`);
  const lengths = [32, 36, 40, 44].map(u32);
  const shape = lengths.slice(0, ndim);
  must(shape.every((n) => n >= 1 && n <= MAX_DIMENSION), `shape ${shape.join(" x ")}; allowed: 1 to ${MAX_DIMENSION} each`);
  must(lengths.slice(ndim).every((n) => n === 0), "a dimension after the last is not 0");
  const dtype = DTYPES[u8(48)];
  must(dtype, `dtype ${u8(48)}; allowed: 0 to ${DTYPES.length - 1}`);
  must(u32(52) <= 1, `flags 0x${u32(52).toString(16)}; only bit 0 is defined`);
  const transposed = u32(52) === 1;
  must(!transposed || ndim === 2, "transposed without two dimensions");
  const [importance, error] = [56, 64].map((position) => view.getFloat64(at + position, true));
  must(Number.isFinite(importance), `importance ${importance} is not finite`);
  must(Number.isFinite(error) && error >= 0, `error ${error}; it must be finite and 0 or more`);
  for (let position = 72; position < 96; position++) must(u8(position) === 0, "a reserved byte is not 0");

  const chunk = {
    number, nameId, name: names[nameId], kind: kind.name, kindCode: u16(4), isBlock: Boolean(kind.block),
    isWeight: kind.name !== "file" && !kind.restores, level: u16(6), offset: expected, storedLength: Number(stored), rawLength: Number(raw),
    end: expected + Number(stored), shape, dtype, rank: u16(50), transposed, importance, error, where,
    digest: hex(new Uint8Array(view.buffer, view.byteOffset + at + 96, 32)),
  };
  if (kind.block) must(ndim === 2 && dtype === "f16", "a block has two dimensions and dtype f16");
  if (kind.narrow) must(shape[1] <= 65535, `${shape[1]} columns; allowed: 1 to 65535`);
  const wanted = kind.rule(chunk);
  must(typeof wanted === "number", wanted);
  must(wanted === chunk.rawLength, `raw length ${raw}; its shape asks for ${wanted}`);
  must(!["file", "original"].includes(kind.name) || isPlainPath(chunk.name), "the name of a file or original must be a plain relative path");
  return chunk;
}

function checkStack(chunk, before, must) {
  const level = before ? before.level + 1 : 0;
  must(!before || (before.isBlock && (chunk.isBlock || chunk.kind === "exact")), "a name with several chunks has only blocks");
  must(chunk.level === level, before ? `level ${chunk.level} follows level ${before.level}; allowed: ${level}`
    : `level ${chunk.level} is the first of its name; it must be 0`);
  const on = KINDS.get(chunk.kindCode).on;
  const below = before ? before.kind : "";
  must(on.includes(below), `${chunk.kind} ${below ? `stands on ${below}` : "is the first of its stack"}; ` +
    `allowed: ${on.map((kind) => (kind ? `on ${kind}` : "first")).join(", ")}`);
  if (before) {
    must(chunk.shape.every((n, i) => n === before.shape[i]), "its shape is another than that of the block below");
    must(chunk.transposed === before.transposed, "it is transposed where the block below is not, or the reverse");
  }
}

function fail(where, what) {
  throw new DamagedError(`${where}: ${what}`);
}
