import type { Arch } from '../model_options.ts';
import { GiB, KiB, MiB } from '../uapi.ts';

const TABLE = 4 * KiB;
const ENTRIES = 512;
const BLOCK = 2 * MiB;

/** Bits of the descriptors. Accessed and dirty are set, so that the CPU has nothing to write into the tables. */
export const DESCRIPTORS = {
  /** present, writable, accessed; for 2 MiB also dirty and page size. Intel SDM volume 3, 4.5 */
  x86_64: { table: 0x23n, block: 0xe3n, valid: 1n, isTable: (entry: bigint): boolean => (entry & 0x80n) === 0n },
  /** table; block of normal memory (attribute 0), inner shareable, accessed, for EL1. Arm ARM D8.3 */
  aarch64: { table: 3n, block: 0x701n, valid: 1n, isTable: (entry: bigint): boolean => (entry & 2n) !== 0n },
} as const;

interface Range {
  readonly address: number;
  readonly size: number;
}

/**
 * An identity map in 2 MiB blocks, four levels deep, built as it is needed: one 1 GiB window after the other, out of a few pages of guest memory.
 * When they are used up it starts again.
 */
export class PageTables {
  /** Physical address of the root table: the same for ever. */
  readonly root: number;
  readonly #bits: { readonly table: bigint; readonly block: bigint };
  readonly #write: (address: number, data: Uint8Array) => void;
  readonly #pages: number;
  /** Taken of these. */
  #used = 0;
  /** The tables of 512 GiB, and the windows that are mapped, by their number. */
  readonly #uppers = new Map<number, number>();
  readonly #windows = new Set<number>();

  /** @param pool Address and number of the pages for tables. */
  constructor(
    arch: Arch,
    pool: { readonly address: number; readonly pages: number },
    write: (address: number, data: Uint8Array) => void,
  ) {
    this.root = pool.address;
    this.#bits = DESCRIPTORS[arch];
    this.#pages = pool.pages;
    this.#write = write;
  }

  /** Maps all that the ranges touch, together at most five windows. What was mapped before may be gone. */
  map(...ranges: readonly Range[]): void {
    if (this.#used > 0 && ranges.every((range) => this.#try(range))) return;
    this.#uppers.clear();
    this.#windows.clear();
    this.#used = 0;
    this.#newTable(new Uint8Array(TABLE));
    if (!ranges.every((range) => this.#try(range))) throw new RangeError('more windows than the page tables can hold');
  }

  /** False when too few pages are left. */
  #try({ address, size }: Range): boolean {
    for (let window = Math.floor(address / GiB); window * GiB < address + size; window++) {
      if (this.#windows.has(window)) continue;
      const number = Math.floor(window / ENTRIES);
      const known = this.#uppers.get(number);
      if (this.#used + (known === undefined ? 2 : 1) > this.#pages) return false;
      const upper = known ?? this.#newTable(new Uint8Array(TABLE));
      if (known === undefined) this.#link(this.root, number, upper);
      this.#uppers.set(number, upper);
      this.#link(upper, window % ENTRIES, this.#newTable(this.#blocks(window)));
      this.#windows.add(window);
    }
    return true;
  }

  /** Builds everything anew when next asked: somebody else may have written to the tables. */
  forget(): void {
    this.#used = 0;
  }

  #blocks(window: number): Uint8Array {
    const first = BigInt(window * GiB) | this.#bits.block;
    const entries = BigUint64Array.from({ length: ENTRIES }, (_, index) => first + BigInt(index * BLOCK));
    return new Uint8Array(entries.buffer);
  }

  #newTable(content: Uint8Array): number {
    const address = this.root + this.#used++ * TABLE;
    this.#write(address, content);
    return address;
  }

  #link(table: number, index: number, target: number): void {
    const entry = new BigUint64Array([BigInt(target) | this.#bits.table]);
    this.#write(table + 8 * index, new Uint8Array(entry.buffer));
  }
}
