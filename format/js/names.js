/** The names table (SPEC.md, section 8). */

import { DamagedError } from "./errors.js";

const MAX_NAME_LENGTH = 1024;
const FORBIDDEN = /[\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069]/;

/** Decode strict UTF-8, or throw a DamagedError that starts with `what`. A byte order mark is kept. */
export function utf8(bytes, what) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch (cause) {
    throw new DamagedError(`${what}: not strict UTF-8`, { cause });
  }
}

/** Return the names of a table, of which there can be at most `limit`. */
export function parseNames(table, limit) {
  const view = new DataView(table.buffer, table.byteOffset, table.length);
  const names = new Set();
  for (let position = 0; position < table.length; ) {
    const what = `names table, offset ${position}`;
    if (table.length - position < 4) throw new DamagedError(`${what}: ${table.length - position} bytes left over`);
    const length = view.getUint32(position, true);
    position += 4;
    if (length < 1 || length > Math.min(MAX_NAME_LENGTH, table.length - position)) {
      throw new DamagedError(`${what}: a name of ${length} bytes; allowed: 1 to 1024, and to the end of the table`);
    }
    if (names.size === limit) throw new DamagedError(`${what}: more names than the ${limit} chunks`);
    const name = utf8(table.subarray(position, position + length), what);
    const shown = JSON.stringify(name);
    if (FORBIDDEN.test(name)) throw new DamagedError(`${what}: ${shown} has a control or direction character`);
    if (names.has(name)) throw new DamagedError(`${what}: ${shown} appears twice`);
    names.add(name);
    position += length;
  }
  return [...names];
}

/** True for a relative POSIX path without tricks, as the name of a file must be. */
export function isPlainPath(name) {
  return !/[\\:]/.test(name) && !name.split("/").some((segment) => segment === "" || segment === "." || segment === "..");
}
