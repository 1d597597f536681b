import { crc32 } from 'node:zlib';
import type { Arch } from '../model_options.ts';
import { type VmType, vmTypeNames } from '../vm_type.ts';

/**
 * What the store knows of a memory besides its bytes, as plain data and as bytes on disk: docs/store.md. Nothing read here is believed: every
 * count is held against the bytes that are left, every number against what it may be.
 */

export interface StoredRegion {
  /** 'host': bytes of the data file, for HostMemory. 'guest-memfd': a file that is created anew; `dataOffset` where its bytes were saved. */
  readonly kind: 'host' | 'guest-memfd';
  readonly size: number;
  /** Of a guest_memfd. */
  readonly flags: bigint;
  /** Bytes of the data file before its first; null where it has none there. */
  readonly dataOffset: number | null;
}

export interface StoredSlot {
  readonly slot: number;
  readonly address: number;
  readonly size: number;
  /** Index of the region of its host memory; null without. */
  readonly host: number | null;
  readonly hostOffset: number;
  readonly guestMemfd: number | null;
  readonly guestMemfdOffset: number;
  readonly readonly: boolean;
  readonly logDirtyPages: boolean;
}

/** A device of the ledger, and what it held. */
export interface StoredUser {
  readonly name: string;
  readonly holds: readonly { readonly address: number; readonly size: number }[];
}

/** One call that puts a piece of a vCPU's state back: an ioctl with a struct, or KVM_SET_ONE_REG with the register's id. */
export interface StoredState {
  readonly call: 'ioctl' | 'register';
  readonly number: bigint;
  readonly bytes: Uint8Array;
}

export interface StoredVcpu {
  readonly id: number;
  readonly state: readonly StoredState[];
}

/** Ranges of pages, ascending and apart: start and end of each, little-endian u64. */
export type PageRanges = Uint8Array;

export interface Metadata {
  /** Bytes of the data file. */
  readonly size: number;
  readonly arch: Arch;
  readonly vmType: VmType;
  readonly pageSize: number;
  /** Whether its bytes are a copy, which attach() must not let a guest change. */
  readonly isSnapshot: boolean;
  readonly tags: ReadonlyMap<string, string>;
  readonly regions: readonly StoredRegion[];
  readonly slots: readonly StoredSlot[];
  readonly users: readonly StoredUser[];
  readonly vcpus: readonly StoredVcpu[];
  readonly privatePages: PageRanges;
}

export class BadMetadata extends Error {}

export const HEADER_SIZE = 40;
const MAGIC = 0x31304d454d545347n; // 'GSTMEM01'
const VERSION = 1;
const NONE = 0xffff_ffff;
const RANGE_SIZE = 16;
/** 16 TiB is what must fit; a size beyond 2^52 is no size. */
const SIZE_MAX = 2 ** 52;
const PAGE_MAX = 2 ** 40;

/** A whole copy: header, body. */
export function encode(metadata: Metadata, sequence: bigint): Uint8Array {
  const body = encodeBody(metadata);
  const copy = new Uint8Array(HEADER_SIZE + body.length);
  const header = new DataView(copy.buffer);
  header.setBigUint64(0, MAGIC, true);
  header.setUint32(8, VERSION, true);
  header.setUint32(12, HEADER_SIZE, true);
  header.setBigUint64(16, sequence, true);
  header.setBigUint64(24, BigInt(body.length), true);
  header.setUint32(32, crc32(body), true);
  header.setUint32(36, crc32(copy.subarray(0, 36)), true);
  copy.set(body, HEADER_SIZE);
  return copy;
}

/** @throws BadMetadata */
export function decode(copy: Uint8Array): { readonly metadata: Metadata; readonly sequence: bigint } {
  if (copy.length < HEADER_SIZE) throw new BadMetadata(`it has ${copy.length} bytes, a header has ${HEADER_SIZE}`);
  const header = new DataView(copy.buffer, copy.byteOffset, HEADER_SIZE);
  if (header.getBigUint64(0, true) !== MAGIC) throw new BadMetadata('it does not begin as metadata do');
  if (header.getUint32(36, true) !== crc32(copy.subarray(0, 36)))
    throw new BadMetadata('the checksum of its header is wrong');
  const version = header.getUint32(8, true);
  if (version !== VERSION) throw new BadMetadata(`it has version ${version}, and only ${VERSION} is known`);
  const body = copy.subarray(HEADER_SIZE);
  const length = header.getBigUint64(24, true);
  if (header.getUint32(12, true) !== HEADER_SIZE || length !== BigInt(body.length))
    throw new BadMetadata(`it has ${body.length} bytes behind the header, which says ${length}`);
  if (header.getUint32(32, true) !== crc32(body)) throw new BadMetadata('the checksum of its body is wrong');
  return { metadata: decodeBody(body), sequence: header.getBigUint64(16, true) };
}

function encodeBody(metadata: Metadata): Uint8Array {
  const out = new Writer();
  out.u64(metadata.size);
  out.u32(metadata.pageSize);
  out.u8(metadata.arch === 'aarch64' ? 1 : 0);
  out.u8(metadata.isSnapshot ? 1 : 0);
  out.text(metadata.vmType);
  out.list([...metadata.tags], ([key, value]) => {
    out.text(key);
    out.text(value);
  });
  out.list(metadata.regions, ({ kind, size, flags, dataOffset }) => {
    out.u8((kind === 'host' ? 0 : 1) | (dataOffset === null ? 2 : 0));
    out.u64(size);
    out.u64(flags);
    out.u64(dataOffset ?? 0);
  });
  out.list(metadata.slots, (slot) => {
    out.u32(slot.slot);
    out.u8((slot.readonly ? 1 : 0) | (slot.logDirtyPages ? 2 : 0));
    out.u64(slot.address);
    out.u64(slot.size);
    out.u32(slot.host ?? NONE);
    out.u64(slot.hostOffset);
    out.u32(slot.guestMemfd ?? NONE);
    out.u64(slot.guestMemfdOffset);
  });
  out.list(metadata.users, ({ name, holds }) => {
    out.text(name);
    out.list(holds, ({ address, size }) => {
      out.u64(address);
      out.u64(size);
    });
  });
  out.list(metadata.vcpus, ({ id, state }) => {
    out.u32(id);
    out.list(state, ({ call, number, bytes }) => {
      out.u8(call === 'ioctl' ? 0 : 1);
      out.u64(number);
      out.bytes(bytes);
    });
  });
  out.bytes(metadata.privatePages);
  return out.done();
}

function decodeBody(body: Uint8Array): Metadata {
  const input = new Reader(body);
  const size = input.integer('size', SIZE_MAX);
  const pageSize = input.u32();
  if (![4096, 16384, 65536].includes(pageSize)) throw new BadMetadata(`no page has ${pageSize} bytes`);
  const arch: Arch = input.flags('arch', 1) ? 'aarch64' : 'x86_64';
  const isSnapshot = input.flags('snapshot', 1) === 1;
  const type = input.text();
  const vmType = vmTypeNames.find((name) => name === type);
  if (!vmType) throw new BadMetadata('it names a type of VM that there is not');
  const aligned = (name: string): number => {
    const value = input.integer(name, SIZE_MAX);
    if (value % pageSize) throw new BadMetadata(`${name} ${value} is not a multiple of the page size`);
    return value;
  };
  const tags = new Map(input.list(8, () => [input.text(), input.text()] as const));
  const regions = input.list(25, (): StoredRegion => {
    const bits = input.flags('region', 3);
    const [bytes, flags, offset] = [aligned('size of a region'), input.u64(), aligned('offset of a region')];
    const dataOffset = bits & 2 ? null : offset;
    if (dataOffset !== null && dataOffset + bytes > size) throw new BadMetadata('a region ends behind the data');
    if (!(bits & 1) && dataOffset === null) throw new BadMetadata('host memory without data');
    return { kind: bits & 1 ? 'guest-memfd' : 'host', size: bytes, flags, dataOffset };
  });
  const side = (kind: StoredRegion['kind'], slotSize: number): [index: number | null, offset: number] => {
    const index = input.u32();
    const offset = aligned('offset of a slot');
    if (index === NONE) return [null, offset];
    const region = regions[index];
    if (region?.kind !== kind || offset + slotSize > region.size)
      throw new BadMetadata('a slot shows memory that there is not');
    return [index, offset];
  };
  const slots = input.list(41, (): StoredSlot => {
    const slot = input.u32();
    const bits = input.flags('slot', 3);
    const address = aligned('address of a slot');
    const bytes = aligned('size of a slot');
    const [host, hostOffset] = side('host', bytes);
    const [guestMemfd, guestMemfdOffset] = side('guest-memfd', bytes);
    if (bytes === 0 || (host === null && guestMemfd === null)) throw new BadMetadata('a slot without memory');
    return {
      ...{ slot, address, size: bytes, host, hostOffset, guestMemfd, guestMemfdOffset },
      readonly: (bits & 1) !== 0,
      logDirtyPages: (bits & 2) !== 0,
    };
  });
  const users = input.list(8, () => ({
    name: input.text(),
    holds: input.list(16, () => {
      const hold = { address: input.integer('address of a hold', SIZE_MAX), size: input.integer('hold', SIZE_MAX) };
      if (hold.size === 0) throw new BadMetadata('a hold of nothing');
      return hold;
    }),
  }));
  const vcpus = input.list(8, () => ({
    id: input.integer32('vCPU id', 0x7fff_ffff),
    state: input.list(13, (): StoredState => {
      const call = input.flags('state', 1) ? 'register' : 'ioctl';
      return { call, number: input.u64(), bytes: input.bytes() };
    }),
  }));
  const privatePages = input.bytes();
  checkRanges(privatePages);
  if (!input.atEnd) throw new BadMetadata('there is more behind its end');
  return { size, arch, vmType, pageSize, isSnapshot, tags, regions, slots, users, vcpus, privatePages };
}

/** Read as two halves, because a bigint for each bound would cost more than all the rest. */
function checkRanges(ranges: PageRanges): void {
  if (ranges.length % RANGE_SIZE) throw new BadMetadata('a part of a range');
  const view = new DataView(ranges.buffer, ranges.byteOffset, ranges.byteLength);
  let last = -1;
  for (let at = 0; at < ranges.length; at += 8) {
    const bound = view.getUint32(at, true) + view.getUint32(at + 4, true) * 2 ** 32;
    if (bound <= last || bound > PAGE_MAX) throw new BadMetadata('private ranges that are not in order');
    last = bound;
  }
}

export function* pageRanges(ranges: PageRanges): Generator<{ readonly start: number; readonly end: number }> {
  const view = new DataView(ranges.buffer, ranges.byteOffset, ranges.byteLength);
  const bound = (at: number): number => view.getUint32(at, true) + view.getUint32(at + 4, true) * 2 ** 32;
  for (let at = 0; at < ranges.length; at += RANGE_SIZE) yield { start: bound(at), end: bound(at + 8) };
}

export function encodeRanges(ranges: Iterable<{ readonly start: number; readonly end: number }>, count: number) {
  const bytes = new Uint8Array(count * RANGE_SIZE);
  const view = new DataView(bytes.buffer);
  let at = 0;
  for (const { start, end } of ranges) {
    for (const bound of [start, end]) {
      view.setUint32(at, bound % 2 ** 32, true);
      view.setUint32(at + 4, Math.floor(bound / 2 ** 32), true);
      at += 8;
    }
  }
  return bytes.subarray(0, at);
}

class Writer {
  #bytes = new Uint8Array(1024);
  #view = new DataView(this.#bytes.buffer);
  #at = 0;
  #length = 0;

  u8(value: number): void {
    this.#reserve(1).setUint8(this.#at, value);
  }

  u32(value: number): void {
    this.#reserve(4).setUint32(this.#at, value, true);
  }

  u64(value: number | bigint): void {
    this.#reserve(8).setBigUint64(this.#at, BigInt(value), true);
  }

  bytes(value: Uint8Array): void {
    this.u32(value.length);
    this.#reserve(value.length);
    this.#bytes.set(value, this.#at);
  }

  text(value: string): void {
    this.bytes(Buffer.from(value));
  }

  list<T>(items: readonly T[], write: (item: T) => void): void {
    this.u32(items.length);
    for (const item of items) write(item);
  }

  done(): Uint8Array {
    return this.#bytes.subarray(0, this.#length);
  }

  /** Room for so many bytes at `#at`. The view may be another one afterwards. */
  #reserve(size: number): DataView {
    this.#at = this.#length;
    this.#length += size;
    if (this.#length > this.#bytes.length) {
      const larger = new Uint8Array(2 * this.#length);
      larger.set(this.#bytes);
      this.#bytes = larger;
      this.#view = new DataView(larger.buffer);
    }
    return this.#view;
  }
}

class Reader {
  readonly #body: Uint8Array;
  readonly #view: DataView;
  #at = 0;

  constructor(body: Uint8Array) {
    this.#body = body;
    this.#view = new DataView(body.buffer, body.byteOffset, body.byteLength);
  }

  get atEnd(): boolean {
    return this.#at === this.#body.length;
  }

  u32(): number {
    return this.#view.getUint32(this.#take(4), true);
  }

  u64(): bigint {
    return this.#view.getBigUint64(this.#take(8), true);
  }

  integer32(name: string, max: number): number {
    const value = this.u32();
    if (value > max) throw new BadMetadata(`${name} is ${value}`);
    return value;
  }

  integer(name: string, max: number): number {
    const value = this.u64();
    if (value > BigInt(max)) throw new BadMetadata(`${name} is ${value}`);
    return Number(value);
  }

  flags(name: string, known: number): number {
    const value = this.#view.getUint8(this.#take(1));
    if (value & ~known) throw new BadMetadata(`${name} has flags ${value}`);
    return value;
  }

  /** A part of the file that was read, not a copy. */
  bytes(): Uint8Array {
    const length = this.u32();
    const at = this.#take(length);
    return this.#body.subarray(at, at + length);
  }

  text(): string {
    const bytes = this.bytes();
    return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString();
  }

  /** @param least Bytes that one item has at least, so that a count cannot ask for more than the file could hold. */
  list<T>(least: number, read: () => T): T[] {
    const count = this.u32();
    if (count * least > this.#body.length - this.#at) throw new BadMetadata(`no room for ${count} items`);
    return Array.from({ length: count }, read);
  }

  #take(size: number): number {
    const at = this.#at;
    if (size > this.#body.length - at) throw new BadMetadata('it ends too early');
    this.#at += size;
    return at;
  }
}
