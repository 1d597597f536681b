import { type Addon, AddonUnavailable, loadAddon } from '../linux/addon.ts';

/** Of Unicorn's ABI: architectures, modes and permissions. */
export const UC = {
  arm64: 2,
  x86: 4,
  mode: { arm: 0, real: 2, protected: 4, long: 8 },
  read: 1,
  write: 2,
  execute: 4,
} as const;

/** Why native/unicorn.cc stopped, in its order. */
const events = ['none', 'read', 'write', 'fetch', 'in', 'out', 'interrupt', 'invalid', 'error'] as const;

/** What ended a piece of guest code. Addresses are linear: before paging, behind segments. */
export interface UnicornEvent {
  readonly kind: (typeof events)[number];
  /** Of the memory, or the port. */
  readonly address: bigint;
  readonly size: number;
  readonly value: bigint;
  /** The last instruction that was begun. */
  readonly last: bigint;
  /** The next one, where it stopped between two. */
  readonly next: bigint | null;
}

let found: Addon | string | undefined;

/** The addon, where it can open libunicorn; otherwise what to install. */
export function unicornLibrary(): Addon | string {
  found ??= load();
  return found;
}

function load(): Addon | string {
  try {
    const addon = loadAddon();
    return addon.unicornLoad() === 0 ? addon : 'install libunicorn2 (apt install libunicorn2)';
  } catch (error) {
    if (!(error instanceof AddonUnavailable)) throw error;
    return 'build the addon, install libunicorn2 (apt install libunicorn2)';
  }
}

/** A CPU emulator of libunicorn, with memory and registers of its own. */
export class UnicornEngine {
  readonly #native: Addon;
  readonly #words: BigUint64Array;
  readonly #handle: bigint;
  readonly #register = new Uint8Array(32);
  readonly #registerView = new DataView(this.#register.buffer);

  constructor(native: Addon, arch: number, mode: number) {
    this.#native = native;
    this.#words = new BigUint64Array(native.command);
    this.#fill(BigInt(arch), BigInt(mode));
    this.#handle = BigInt(this.#check('uc_open', native.unicornOpen()));
  }

  close(): void {
    this.#fill(this.#handle);
    this.#native.unicornClose();
  }

  map(address: bigint, bytes: Uint8Array, permissions: number): void {
    this.#fill(this.#handle, address, BigInt(bytes.length), BigInt(permissions));
    this.#check('uc_mem_map', this.#native.unicornMap());
    this.write(address, bytes);
  }

  unmap(address: bigint, size: number): void {
    this.#fill(this.#handle, address, BigInt(size));
    this.#check('uc_mem_unmap', this.#native.unicornUnmap());
  }

  protect(address: bigint, size: number, permissions: number): void {
    this.#fill(this.#handle, address, BigInt(size), BigInt(permissions));
    this.#check('uc_mem_protect', this.#native.unicornProtect());
  }

  write(address: bigint, source: Uint8Array): void {
    this.#fill(this.#handle, address);
    this.#check('uc_mem_write', this.#native.unicornWrite(source));
  }

  read(address: bigint, target: Uint8Array): void {
    this.#fill(this.#handle, address);
    this.#check('uc_mem_read', this.#native.unicornRead(target));
  }

  setRegister(register: number, value: bigint): void {
    this.#register.fill(0);
    this.#registerView.setBigUint64(0, BigInt.asUintN(64, value), true);
    this.setBytes(register, this.#register);
  }

  register(register: number): bigint {
    this.#register.fill(0);
    this.bytes(register, this.#register);
    return this.#registerView.getBigUint64(0, true);
  }

  setBytes(register: number, bytes: Uint8Array): void {
    this.#fill(this.#handle, BigInt(register));
    this.#check('uc_reg_write', this.#native.unicornSetRegister(bytes));
  }

  bytes(register: number, bytes: Uint8Array): void {
    this.#fill(this.#handle, BigInt(register));
    this.#check('uc_reg_read', this.#native.unicornGetRegister(bytes));
  }

  /** Runs up to so many instructions; `answer` is what the first `in` reads. */
  start(pc: bigint, instructions: number, answer: number | null): UnicornEvent {
    this.#fill(this.#handle, pc, BigInt(instructions), answer === null ? 0n : 1n, BigInt(answer ?? 0));
    this.#check('uc_emu_start', this.#native.unicornStart());
    const [event = 0n, address = 0n, size = 0n, value = 0n, last = 0n, between, next = 0n] = this.#words;
    return {
      kind: events[Number(event)] ?? 'error',
      address,
      size: Number(size),
      value,
      last,
      next: between ? next : null,
    };
  }

  #fill(...words: bigint[]): void {
    for (const [index, word] of words.entries()) this.#words[index] = word;
  }

  #check(what: string, result: number): number {
    if (result < 0) throw new Error(`libunicorn: ${what} failed (${result})`);
    return result;
  }
}
