import type { U64 } from '../kernel.ts';

/** Writes the 64-bit words that a native function reads. Values are checked before, so nothing here can run a caller's code. */
export class Command {
  readonly #halves: Uint32Array;
  readonly #words: BigUint64Array;

  constructor(buffer: ArrayBuffer) {
    this.#halves = new Uint32Array(buffer);
    this.#words = new BigUint64Array(buffer);
  }

  /** A checked 64-bit value: the typed array keeps the low half of a number, and the high half is what is left. */
  u64(index: number, value: U64): this {
    if (typeof value === 'number') {
      this.#halves[2 * index] = value;
      this.#halves[2 * index + 1] = value / 0x1_0000_0000;
    } else {
      this.#words[index] = value;
    }
    return this;
  }

  /** A checked 32-bit value; the native side reads the low half only. */
  i32(index: number, value: number): this {
    this.#halves[2 * index] = value;
    return this;
  }

  /** A word that a native function left. */
  result(index: number): bigint {
    return this.#words[index] as bigint;
  }
}
