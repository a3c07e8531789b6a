/** SHA-256 (FIPS 180-4): of bytes at hand through crypto.subtle, and of a stream, which crypto.subtle cannot do. */

const primes = [];
for (let n = 2; primes.length < 64; n++) if (primes.every((p) => n % p)) primes.push(n);
const fraction = (x) => ((x - Math.floor(x)) * 2 ** 32) | 0;
const START = primes.slice(0, 8).map((p) => fraction(Math.sqrt(p)));
const ROUND = Int32Array.from(primes, (p) => fraction(Math.cbrt(p)));

export const hex = (bytes) => Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");

/** Return the SHA-256 of a Uint8Array, 64 hexadecimal digits. */
export async function sha256(bytes) {
  const subtle = globalThis.crypto?.subtle; // absent on pages that do not come over https
  if (!subtle) return new Sha256().update(bytes).hex();
  return hex(new Uint8Array(await subtle.digest("SHA-256", bytes)));
}

/** SHA-256 of a stream of bytes. */
export class Sha256 {
  #state = Int32Array.from(START);
  #block = new Uint8Array(64);
  #words = new Int32Array(64);
  #filled = 0;
  #length = 0;

  update(bytes) {
    this.#length += bytes.length;
    let position = 0;
    if (this.#filled) {
      position = Math.min(64 - this.#filled, bytes.length);
      this.#block.set(bytes.subarray(0, position), this.#filled);
      this.#filled += position;
      if (this.#filled < 64) return this;
      this.#compress(this.#block, 0);
    }
    for (; position + 64 <= bytes.length; position += 64) this.#compress(bytes, position);
    this.#block.set(bytes.subarray(position));
    this.#filled = bytes.length - position;
    return this;
  }

  /** Return the digest, 64 hexadecimal digits. Nothing can be added afterwards. */
  hex() {
    const end = new Uint8Array(this.#filled < 56 ? 64 - this.#filled : 128 - this.#filled);
    end[0] = 0x80;
    new DataView(end.buffer).setBigUint64(end.length - 8, BigInt(this.#length) * 8n);
    this.update(end);
    return Array.from(this.#state, (word) => (word >>> 0).toString(16).padStart(8, "0")).join("");
  }

  #compress(bytes, at) {
    const w = this.#words;
    const s = this.#state;
    for (let i = 0; i < 16; i++, at += 4) {
      w[i] = (bytes[at] << 24) | (bytes[at + 1] << 16) | (bytes[at + 2] << 8) | bytes[at + 3];
    }
    for (let i = 16; i < 64; i++) {
      const x = w[i - 15];
      const y = w[i - 2];
      const s0 = ((x >>> 7) | (x << 25)) ^ ((x >>> 18) | (x << 14)) ^ (x >>> 3);
      const s1 = ((y >>> 17) | (y << 15)) ^ ((y >>> 19) | (y << 13)) ^ (y >>> 10);
      w[i] = (w[i - 16] + s0 + w[i - 7] + s1) | 0;
    }
    let [a, b, c, d, e, f, g, h] = s;
    for (let i = 0; i < 64; i++) {
      const s1 = ((e >>> 6) | (e << 26)) ^ ((e >>> 11) | (e << 21)) ^ ((e >>> 25) | (e << 7));
      const t1 = (h + s1 + ((e & f) ^ (~e & g)) + ROUND[i] + w[i]) | 0;
      const s0 = ((a >>> 2) | (a << 30)) ^ ((a >>> 13) | (a << 19)) ^ ((a >>> 22) | (a << 10));
      const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      h = g; g = f; f = e; e = (d + t1) | 0;
      d = c; c = b; b = a; a = (t1 + t2) | 0;
    }
    s[0] += a; s[1] += b; s[2] += c; s[3] += d; s[4] += e; s[5] += f; s[6] += g; s[7] += h;
  }
}
