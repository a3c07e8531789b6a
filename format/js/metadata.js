/** The metadata (SPEC.md, section 8): JSON as RFC 8259 has it, without what JSON.parse lets pass. */

import { DamagedError } from "./errors.js";
import { utf8 } from "./names.js";

const MAX_DEPTH = 32;
const MAX_STRUCTURE = 2 ** 18;
const NUMBER = /-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?/y;
const LONE_SURROGATE = /\p{Surrogate}/u;

/** Return the metadata's object. It and all within have no prototype, so no key has a meaning. Numbers are f64. */
export function parseMetadata(bytes) {
  const text = utf8(bytes, "metadata");
  checkStructure(text);
  const parser = new Parser(text);
  parser.skip();
  if (text[parser.position] !== "{") parser.fail("it must be one JSON object");
  const value = parser.value();
  parser.skip();
  if (parser.position !== text.length) parser.fail("something follows the object");
  return value;
}

/** The limits on nesting and size, before anything is built. */
function checkStructure(text) {
  let [depth, structure] = [0, 0];
  for (let position = 0; position < text.length; position++) {
    const c = text[position];
    if (c === '"') position = endOfString(text, position) - 1;
    else if (c === "]" || c === "}") depth--;
    else if (c === "[" || c === "{" || c === "," || c === ":") {
      if (++structure > MAX_STRUCTURE) throw new DamagedError(`metadata: more than ${MAX_STRUCTURE} of [ { , :`);
      if ((c === "[" || c === "{") && ++depth > MAX_DEPTH) throw new DamagedError(`metadata: nested deeper than ${MAX_DEPTH}`);
    }
  }
}

/** Return the position after the string that starts at `start`, or the text's length where it has no end. */
function endOfString(text, start) {
  for (let position = start + 1; position < text.length; position++) {
    const c = text[position];
    if (c === "\\") position++;
    else if (c === '"') return position + 1;
  }
  return text.length;
}

class Parser {
  position = 0;

  constructor(text) {
    this.text = text;
  }

  fail(what) {
    throw new DamagedError(`metadata, character ${this.position}: ${what}`);
  }

  skip() {
    while (" \t\n\r".includes(this.text[this.position] || "x")) this.position++;
  }

  expect(c) {
    this.skip();
    if (this.text[this.position] !== c) this.fail(`${c} expected`);
    this.position++;
  }

  /** Take `c` if it comes next. */
  took(c) {
    this.skip();
    const found = this.text[this.position] === c;
    if (found) this.position++;
    return found;
  }

  value() {
    this.skip();
    const c = this.text[this.position];
    if (c === "{") return this.object();
    if (c === "[") return this.array();
    if (c === '"') return this.string();
    for (const [word, value] of [["true", true], ["false", false], ["null", null]]) {
      if (this.text.startsWith(word, this.position)) {
        this.position += word.length;
        return value;
      }
    }
    return this.number();
  }

  object() {
    const found = Object.create(null);
    this.position++;
    if (this.took("}")) return found;
    do {
      this.skip();
      if (this.text[this.position] !== '"') this.fail("a key expected");
      const key = this.string();
      if (key in found) this.fail(`${JSON.stringify(key.slice(0, 100))} appears twice`);
      this.expect(":");
      found[key] = this.value();
    } while (this.took(","));
    this.expect("}");
    return found;
  }

  array() {
    const found = [];
    this.position++;
    if (this.took("]")) return found;
    do found.push(this.value());
    while (this.took(","));
    this.expect("]");
    return found;
  }

  string() {
    const end = endOfString(this.text, this.position);
    let value;
    try {
      value = JSON.parse(this.text.slice(this.position, end));
    } catch {
      this.fail("a string that is not JSON");
    }
    if (LONE_SURROGATE.test(value)) this.fail("half a surrogate pair");
    this.position = end;
    return value;
  }

  number() {
    NUMBER.lastIndex = this.position;
    const token = NUMBER.exec(this.text)?.[0];
    if (token === undefined) this.fail("a value expected");
    const value = Number(token);
    if (!Number.isFinite(value)) this.fail("a number that is not finite in f64");
    this.position += token.length;
    return value;
  }
}
