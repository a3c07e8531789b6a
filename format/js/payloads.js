/** What must hold inside the decoded bytes of a block before it is used (SPEC.md, section 6). */

import { DamagedError } from "./errors.js";

const ceil = (a, b) => Math.ceil(a / b);

/** Check the decoded bytes of a chunk; throw a DamagedError. */
export function checkPayload(chunk, raw) {
  const view = new DataView(raw.buffer, raw.byteOffset, raw.length);
  if (chunk.kind === "spqr") checkPermutation(chunk, view);
  if (chunk.kind === "outliers") checkPlaces(chunk, view);
  if (chunk.kind === "exact") checkExact(chunk, view, raw);
}

function checkExact({ where, rawLength, shape: [m, n] }, view, raw) {
  const fail = (what) => {
    throw new DamagedError(`${where}: ${what}`);
  };
  const trailing = view.getUint32(0, true);
  if (trailing > 22) fail(`it leaves out ${trailing} bits of a value; allowed: 0 to 22`);
  const counts = Array.from({ length: 64 }, (_, number) => view.getUint32(4 + 4 * number, true));
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (total !== m * n) fail(`its classes have ${total} symbols for ${m} x ${n} weights`);
  let [at, bits, escapes] = [260 + m, 0, 0];
  counts.forEach((count, number) => {
    let escaped = 0;
    for (const end = at + count; at < end; at++) escaped += raw[at] === 0x80;
    bits += Math.min(Math.max(Math.floor(number / 2) - 5, 0), 22 - trailing) * (count - escaped);
    escapes += escaped;
  });
  const length = at + ceil(bits, 8) + 4 * escapes;
  if (length !== rawLength) fail(`raw length ${rawLength}; its symbols ask for ${length}`);
}

function checkPermutation({ where, shape: [, n] }, view) {
  const seen = new Uint8Array(n);
  for (let p = 0; p < n; p++) {
    const column = view.getUint16(2 * p, true);
    if (column >= n) throw new DamagedError(`${where}: position ${p} is column ${column} of ${n}`);
    if (seen[column]++) throw new DamagedError(`${where}: column ${column} stands twice in the permutation`);
  }
}

function checkPlaces({ where, rawLength, shape: [m, n] }, view) {
  const count = (rawLength - 4 * (m + 1)) / 4;
  const pointer = (row) => view.getUint32(4 * row, true);
  const fail = (what) => {
    throw new DamagedError(`${where}: ${what}`);
  };
  if (pointer(0) !== 0 || pointer(m) !== count) fail(`its row pointer goes from ${pointer(0)} to ${pointer(m)}, not 0 to ${count}`);
  for (let row = 0; row < m; row++) {
    if (pointer(row + 1) < pointer(row) || pointer(row + 1) > count) fail(`its row pointer falls or leaves the block at row ${row + 1}`);
    let before = -1;
    for (let place = pointer(row); place < pointer(row + 1); place++) {
      const column = view.getUint16(4 * (m + 1) + 2 * place, true);
      if (column >= n) fail(`row ${row} has column ${column} of ${n}`);
      if (column <= before) fail(`the columns of row ${row} do not rise`);
      before = column;
    }
  }
}
