import type { FileStatus, Kernel, Result, U64 } from '../../lib/kernel/kernel.ts';
import { errnoName } from '../../lib/uapi.ts';
import { Guest } from '../conformance/guest.ts';
import { type Outcome, Scenario } from '../conformance/scenario.ts';
import {
  type Facts,
  type Fd,
  type FdKind,
  type Host,
  isMappedPage,
  type Num,
  resolveNum,
  type Step,
} from './program.ts';

const [MEM_SHARE, MEM_UNSHARE] = [0xc600_0003n, 0xc600_0004n];
const REGULAR = 0o100000;
/** Pages that mincore is asked about at once. */
const LONGEST = 1024;

/** Everything a program has made in one kernel, and how one of its steps is carried out there. */
export class World {
  readonly kernel: Kernel;
  readonly #facts: Facts;
  readonly #fds: Readonly<Record<FdKind, number[]>>;
  readonly #mappings: number[] = [];
  /** Numbers in the order in which they were first seen: what two kernels have in common of an fd. */
  readonly #ordinals = new Map<number, number>();
  readonly #guests = new Map<number, Guest | string>();
  readonly #scenario: Scenario;

  constructor(kernel: Kernel, facts: Facts) {
    this.kernel = kernel;
    this.#facts = facts;
    this.#fds = { kvm: [kernel.openKvm()], vm: [], file: [], vcpu: [] };
    this.#scenario = new Scenario(kernel, () => null);
  }

  count(kind: FdKind): number {
    return this.#fds[kind].length;
  }

  get mappings(): number {
    return this.#mappings.length;
  }

  /** What the name stands for: its place among those of its kind, or -1. */
  index(fd: Fd): number {
    const [, kind = '', index = '0'] = /^([a-z]+)(\d*)$/.exec(fd) ?? [];
    const count = this.#fds[kind as FdKind]?.length ?? 0;
    return count === 0 ? -1 : Number(index) % count;
  }

  number(fd: Fd): number {
    const kind = /^[a-z]+/.exec(fd)?.[0] as FdKind;
    return this.#fds[kind]?.[this.index(fd)] ?? -1;
  }

  mappingIndex(map: number): number {
    return this.#mappings.length === 0 ? -1 : map % this.#mappings.length;
  }

  /** What came back, in a form that two kernels have in common. */
  perform(step: Step, fileSize: U64): Outcome {
    const { kernel } = this;
    const value = (num: Num): U64 => resolveNum(num, this.#facts, fileSize);
    switch (step.call) {
      case 'createVm':
        return this.#opened('vm', kernel.createVm(this.number(step.fd), value(step.type)));
      case 'checkExtension':
        return kernel.checkExtension(this.number(step.fd), step.cap);
      case 'createGuestMemfd': {
        const args = { size: value(step.size), flags: step.flags };
        return this.#opened('file', kernel.createGuestMemfd(this.number(step.vm), args));
      }
      case 'setUserMemoryRegion':
        return kernel.setUserMemoryRegion(this.number(step.vm), this.#region(step, value));
      case 'setUserMemoryRegion2':
        return kernel.setUserMemoryRegion2(this.number(step.vm), {
          ...this.#region(step, value),
          guestMemfdOffset: value(step.offset),
          guestMemfd: this.number(step.file),
        });
      case 'setMemoryAttributes':
        return kernel.setMemoryAttributes(this.number(step.vm), {
          address: value(step.address),
          size: value(step.size),
          attributes: step.attributes,
          flags: step.flags,
        });
      case 'enableCap':
        return kernel.enableCap(this.number(step.fd), {
          cap: step.cap,
          flags: step.flags,
          args: [value(step.value), 0, 0, 0],
        });
      case 'getDirtyLog': {
        const bitmap = step.bytes === null ? null : new Uint8Array(step.bytes).fill(0xee);
        const result = kernel.getDirtyLog(this.number(step.vm), { slot: step.slot, dirtyBitmap: bitmap });
        return result < 0 ? result : hex(bitmap);
      }
      case 'clearDirtyLog':
        return kernel.clearDirtyLog(this.number(step.vm), {
          slot: step.slot,
          firstPage: step.first,
          numPages: step.pages,
          dirtyBitmap: step.bytes === null ? null : new Uint8Array(step.bytes).fill(0xff),
        });
      case 'createVcpu':
        return this.#opened('vcpu', kernel.createVcpu(this.number(step.vm), step.id));
      case 'preFaultMemory': {
        const args = { gpa: BigInt(value(step.gpa)), size: BigInt(value(step.size)), flags: step.flags };
        return [kernel.preFaultMemory(this.number(step.vcpu), args), args.gpa, args.size];
      }
      case 'memfdCreate':
        return this.#opened('file', kernel.memfdCreate('differential', step.flags));
      case 'fallocate':
        return kernel.fallocate(this.number(step.fd), step.mode, value(step.offset), value(step.length));
      case 'ftruncate':
        return kernel.ftruncate(this.number(step.fd), value(step.length));
      case 'fstat':
        return this.#fstat(this.number(step.fd));
      case 'fstatfs': {
        const status: { type?: number; bsize?: number } = {};
        const result = kernel.fstatfs(this.number(step.fd), status);
        return result < 0 ? result : status.type;
      }
      case 'fsync':
      case 'close':
        return kernel[step.call](this.number(step.fd));
      case 'fcntl':
        return kernel.fcntl(this.number(step.fd), step.command, step.argument);
      case 'dup':
        return this.#opened(kindOf(step.fd), kernel.dup(this.number(step.fd)));
      case 'read':
        return this.#bytesOf(step.bytes, (target) => kernel.read(this.number(step.fd), target));
      case 'pread':
        return this.#bytesOf(step.bytes, (target) => kernel.pread(this.number(step.fd), target, value(step.offset)));
      case 'write':
        return kernel.write(this.number(step.fd), new Uint8Array(step.bytes).fill(0xa5));
      case 'pwrite':
        return kernel.pwrite(this.number(step.fd), new Uint8Array(step.bytes).fill(0x5a), value(step.offset));
      case 'lseek':
        return kernel.lseek(this.number(step.fd), value(step.offset), step.whence);
      case 'cachestat':
        return this.#cachestat(this.number(step.fd), value(step.offset), value(step.length));
      case 'mmap': {
        const args = { length: value(step.length), prot: step.prot, flags: step.flags, offset: value(step.offset) };
        const mapping = kernel.mmap({ ...args, fd: this.number(step.fd) });
        if (mapping >= 0) this.#mappings.push(mapping);
        return mapping < 0 ? mapping : 'mapping';
      }
      case 'munmap': {
        const result = kernel.munmap(this.#mapping(step.map));
        // The handle, unlike an fd, is ours to reuse: who does so first is not a matter between kernels.
        if (result === 0) this.#mappings[this.mappingIndex(step.map)] = -1;
        return result;
      }
      case 'mprotect':
        return kernel.mprotect(this.#mapping(step.map), value(step.from), value(step.length), step.prot);
      case 'madvise':
        return kernel.madvise(this.#mapping(step.map), value(step.from), value(step.length), step.advice);
      case 'msync':
        return kernel.msync(this.#mapping(step.map), value(step.from), value(step.length), step.flags);
      case 'mlock':
      case 'munlock':
        return kernel[step.call](this.#mapping(step.map), value(step.from), value(step.length));
      case 'mincore': {
        const residency = new Uint8Array(Math.min(LONGEST, Math.ceil(Number(value(step.length)) / this.#facts.page)));
        const result = kernel.mincore(this.#mapping(step.map), value(step.from), value(step.length), residency);
        return result < 0 ? result : hex(residency.map((byte) => byte & 1));
      }
      case 'peek': {
        const target = new Uint8Array(Math.min(16 * this.#facts.page, Number(value(step.length))));
        const result = kernel.peek(this.#mapping(step.map), value(step.from), target);
        return result < 0 ? result : [result, this.#sample(target.subarray(0, result))];
      }
      case 'poke': {
        const source = new Uint8Array(Math.min(16 * this.#facts.page, Number(value(step.length)))).fill(step.value);
        return kernel.poke(this.#mapping(step.map), value(step.from), source);
      }
      case 'guestRead':
        return this.#guest(step.vm, (guest) => guest.get(step.page));
      case 'guestWrite':
        return this.#guest(step.vm, (guest) => guest.put(step.page, step.value));
      case 'guestShare':
      case 'guestUnshare': {
        const number = step.call === 'guestShare' ? MEM_SHARE : MEM_UNSHARE;
        return this.#guest(step.vm, (guest) => guest.hypercall(number, BigInt(step.page * this.#facts.page)));
      }
    }
  }

  /** Gives everything back; what close and munmap said. */
  close(): Outcome {
    const said: Result[] = [];
    const unmapped = new Set([-1]);
    for (const mapping of this.#mappings) {
      if (!unmapped.has(mapping)) said.push(this.kernel.munmap(mapping));
      unmapped.add(mapping);
    }
    this.#scenario.close();
    for (const fd of this.#ordinals.keys()) said.push(this.kernel.close(fd));
    this.kernel.close(this.number('kvm'));
    return said;
  }

  #opened(kind: FdKind, result: Result): Outcome {
    if (result < 0) return result;
    this.#fds[kind].push(result);
    const known = this.#ordinals.get(result);
    if (known !== undefined) return `fd ${known} again`;
    this.#ordinals.set(result, this.#ordinals.size);
    return 'fd';
  }

  #mapping(map: number): number {
    return this.#mappings[this.mappingIndex(map)] ?? -1;
  }

  #hva(hva: Host, value: (num: Num) => U64): U64 {
    if (!isMappedPage(hva)) return value(hva);
    const mapping = this.#mapping(hva.mapping);
    return mapping < 0 ? 0 : this.kernel.addressOf(mapping) + BigInt(hva.page * this.#facts.page);
  }

  #region(step: Step & { gpa: Num; hva: Host; slot: number; flags: number; space?: number }, value: (num: Num) => U64) {
    return {
      slot: (((step.space ?? 0) << 16) | step.slot) >>> 0,
      flags: step.flags,
      guestPhysAddr: value(step.gpa),
      memorySize: 'size' in step ? value(step.size) : 0,
      userspaceAddr: this.#hva(step.hva, value),
    };
  }

  #fstat(fd: number): Outcome {
    const status: FileStatus = {};
    const result = this.kernel.fstat(fd, status);
    if (result < 0 || ((status.mode ?? 0) & 0o170000) !== REGULAR) return result;
    return [status.mode, status.size, status.blocks, status.nlink];
  }

  #cachestat(fd: number, offset: U64, length: U64): Outcome {
    const status: { cache?: number } = {};
    const result = this.kernel.cachestat(fd, offset, length, status);
    return result < 0 ? result : status.cache;
  }

  #bytesOf(length: number, read: (target: Uint8Array) => Result): Outcome {
    const target = new Uint8Array(length);
    const result = read(target);
    return result < 0 ? result : [result, this.#sample(target.subarray(0, result))];
  }

  /** The first and the last byte of each page. */
  #sample(bytes: Uint8Array): string {
    const { page } = this.#facts;
    const parts: number[] = [];
    for (let at = 0; at < bytes.length; at += page) {
      parts.push(bytes[at] as number, bytes[Math.min(at + page, bytes.length) - 1] as number);
    }
    return parts.join(' ');
  }

  #guest(vm: Fd, access: (guest: Guest) => Outcome): Outcome {
    const index = this.index(vm);
    let guest = this.#guests.get(index);
    try {
      guest ??= new Guest(this.#scenario, this.number(vm));
      if (typeof guest !== 'string') this.#guests.set(index, guest);
      return typeof guest === 'string' ? guest : access(guest);
    } catch (error) {
      const what = error instanceof TypeError ? 'TypeError' : String(error);
      this.#guests.set(index, what);
      return what;
    }
  }
}

export function kindOf(fd: Fd): FdKind {
  const kind = /^[a-z]+/.exec(fd)?.[0];
  return kind === 'vm' || kind === 'vcpu' || kind === 'file' ? kind : 'kvm';
}

function hex(bytes: Uint8Array | null): string {
  return bytes ? Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('hex') : 'null';
}

/** 'ok' or an errno: what the tally counts a step under. */
export function summary(outcome: Outcome): string {
  const first = Array.isArray(outcome) ? outcome[0] : outcome;
  if (typeof first === 'number') return first < 0 ? errnoName(first) : 'ok';
  return typeof first === 'string' && /^(MMIO|exit|port|Error|TypeError)/.test(first) ? first.slice(0, 40) : 'ok';
}

export function sameOutcome(a: Outcome, b: Outcome): boolean {
  if (a === b) return true;
  if (!Array.isArray(a) || !Array.isArray(b) || a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) if (!sameOutcome(a[i], b[i])) return false;
  return true;
}
