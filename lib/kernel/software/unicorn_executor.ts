import type { Addon } from '../linux/addon.ts';
import type { VmFile } from '../state.ts';
import type { Access, Executor, ExecutorFactory, GuestBus, Stop } from './executor.ts';
import { protectedCall } from './protected_calls.ts';
import { type UnicornCpu, unicornCpu, X86Cpu } from './unicorn_cpu.ts';
import { UC, UnicornEngine, type UnicornEvent, unicornLibrary } from './unicorn_engine.ts';
import type { SoftwareVcpu } from './vcpu.ts';

/** Instructions between two looks at the time: some milliseconds. */
const SLICE = 100_000;
/** KVM's numbers of internal errors: an instruction that cannot be emulated; an exception that cannot be delivered. */
const [EMULATION, DELIVERY] = [1, 3] as const;
/** More pages than one instruction needs. One that needs two copies of the same page never ends. */
const MOST_PAGES = 16;
const INVALID_OPCODE = 6;
const HVC_0 = 0xd400_0002;
/** Functions of PSCI: what the guest's machine does, by what it is asked. */
const systemEvents = new Map([
  [0x8400_0008n, 1],
  [0x8400_0009n, 2],
]);
const PSCI_NOT_SUPPORTED = -1n;
const ARM64_X0 = 199;
/** x0 … x3 */
const ARM64_ARGUMENTS = [ARM64_X0, ARM64_X0 + 1, ARM64_X0 + 2, ARM64_X0 + 3];

type Answer = Uint8Array | bigint | null;

/** An access of the instruction at hand that the host answers. */
interface Asked {
  readonly address: bigint;
  readonly bytes: Uint8Array;
  readonly isWrite: boolean;
}

/** What waits for the host's answer. */
type Pending =
  | { readonly kind: 'in'; readonly size: number; readonly isString: boolean }
  | { readonly kind: 'mmio'; readonly asked: readonly Asked[] };

/**
 * Carries out guest code with libunicorn, in the modes of unicorn_cpu.ts. For code that its user wrote, not for hostile code: libunicorn 2.0.1
 * aborts the process when it translates certain invalid instructions (a far jump through a register, FF E8).
 *
 * Not carried over: a switch of mode or of paging by the guest, exceptions of protected and 64-bit mode with a handler (both end as internal
 * errors), the x87 registers, and accessed and dirty bits of page tables. Other page tables are used from the next slice or exit on.
 */
export const unicornExecutors: ExecutorFactory = {
  get advice(): string {
    const library = unicornLibrary();
    return typeof library === 'string' ? library : 'use KVM, the emulator does not do this CPU mode';
  },
  open(vcpu: SoftwareVcpu): Executor | null {
    const library = unicornLibrary();
    return typeof library === 'string' || !unicornCpu(vcpu) ? null : new UnicornExecutor(library);
  },
};

class UnicornExecutor implements Executor {
  readonly #native: Addon;
  #pending: Pending | null = null;

  constructor(native: Addon) {
    this.#native = native;
  }

  /** Each run has an engine of its own: what the host changed in between, in memory or in registers, is there without asking. */
  run(vcpu: SoftwareVcpu, bus: GuestBus, answer: Answer, expired: () => boolean): Stop {
    for (;;) {
      const cpu = unicornCpu(vcpu);
      if (!cpu) return { kind: 'internal-error', suberror: EMULATION };
      const run = new Run(this.#native, vcpu, cpu, bus);
      try {
        const stop = run.go(this.#pending, answer instanceof Uint8Array ? answer : null, expired);
        if (stop === 'again') {
          this.#pending = null;
          continue;
        }
        this.#pending = run.pending;
        return stop;
      } finally {
        run.close();
      }
    }
  }
}

interface Page {
  readonly gpa: number;
  writable: boolean;
}

/** One stay in the guest. Its pages are copies, fetched when they are touched and written back at the end. */
class Run {
  pending: Pending | null = null;
  readonly #engine: UnicornEngine;
  readonly #cpu: UnicornCpu;
  readonly #bus: GuestBus;
  readonly #vm: VmFile;
  readonly #pageSize: number;
  readonly #pages = new Map<bigint, Page>();
  /** Pages that stand in for a device during one instruction. */
  readonly #standIns = new Set<bigint>();
  #asked: Asked[] = [];

  constructor(native: Addon, vcpu: SoftwareVcpu, cpu: UnicornCpu, bus: GuestBus) {
    this.#engine = new UnicornEngine(native, cpu.arch, cpu.mode);
    this.#cpu = cpu;
    this.#bus = bus;
    this.#vm = vcpu.vm;
    this.#pageSize = vcpu.vm.machine.pageSize;
  }

  close(): void {
    this.#engine.close();
  }

  /** @returns 'again' when the vCPU goes on in an engine of its own. */
  go(pending: Pending | null, answer: Uint8Array | null, expired: () => boolean): Stop | 'again' {
    const cpu = this.#cpu;
    let input: number | null = null;
    if (pending?.kind === 'in' && answer) {
      input = Buffer.from(answer).readUIntLE(0, pending.size);
      if (!pending.isString && cpu instanceof X86Cpu) {
        cpu.setAccumulator(pending.size, input);
        input = null;
      }
    }
    if (pending?.kind === 'mmio') this.#asked = answered(pending.asked, answer);
    cpu.load(this.#engine);
    for (let pc = cpu.pc, tries = 0; ; tries++) {
      const single = this.#asked.length > 0 || input !== null;
      if ((!single || tries > MOST_PAGES) && expired()) return this.#stop(pc, { kind: 'deadline' });
      const refused = this.#standIn();
      if (refused) return this.#stop(pc, refused);
      const event = this.#engine.start(pc, single ? 1 : SLICE, input);
      const next = this.#after(event);
      if (typeof next !== 'bigint') return next;
      // An instruction that stopped at a page is begun again.
      if (event.kind === 'none') {
        this.#leaveStandIns();
        this.#asked = [];
        input = null;
      }
      pc = next;
    }
  }

  /** What to do about an event: where to go on, or the stop that it is. */
  #after(event: UnicornEvent): bigint | Stop | 'again' {
    switch (event.kind) {
      case 'none':
        return event.next === null ? this.#halted() : this.#slice(event.next);
      case 'read':
      case 'write':
      case 'fetch':
        return this.#touched(event);
      case 'in':
      case 'out':
        return this.#port(event);
      case 'interrupt':
        return this.#interrupted(Number(event.value), null, event);
      case 'invalid':
        return this.#interrupted(INVALID_OPCODE, event.last, event);
      case 'error':
        return this.#stop(event.last, { kind: 'internal-error', suberror: EMULATION });
    }
  }

  /** Other page tables take effect here at the latest: what was mapped by the old ones may have been used until now. */
  #slice(pc: bigint): bigint | Stop | 'again' {
    if (!(this.#cpu instanceof X86Cpu) || !this.#cpu.changedTables(this.#engine)) return pc;
    const stop = this.#stop(pc, { kind: 'deadline' });
    return stop.kind === 'deadline' ? 'again' : stop;
  }

  #halted(): bigint | Stop {
    if (this.#cpu instanceof X86Cpu) return this.#stop(null, { kind: 'hlt' });
    // wfi: no interrupt will come, so that only the time can end it.
    return this.#engine.register(260);
  }

  /** Fetches the page that an instruction needs, or finds out why it cannot be had. */
  #touched(event: UnicornEvent): bigint | Stop | 'again' {
    const { address, kind } = event;
    // A fetch leaves the program counter at what it could not fetch, or before it in the same block.
    const pc = kind === 'fetch' ? null : event.last;
    const page = this.#pageOf(address);
    const translated = this.#cpu.translate(page, this.#bus);
    if (translated === null) return this.#stop(pc, { kind: 'shutdown' });
    if (typeof translated !== 'number') return this.#stop(pc, stopOf(translated, null));
    const gpa = translated + Number(address - page);
    const refused =
      kind === 'write' && this.#pages.has(page)
        ? this.#makeWritable(page, gpa, event.size)
        : this.#fetch(page, translated);
    if (!refused) return pc ?? this.#programCounter();
    const data = new Uint8Array(event.size);
    if (kind === 'fetch' && refused.kind === 'mmio')
      return this.#stop(pc, { kind: 'internal-error', suberror: EMULATION });
    if (kind === 'write')
      for (const index of data.keys()) data[index] = Number((event.value >> BigInt(8 * index)) & 255n);
    const stop = stopOf(refused, { gpa, isWrite: kind === 'write', data });
    if (stop.kind !== 'mmio') return this.#stop(pc, stop);
    this.#leaveStandIns();
    this.pending = { kind: 'mmio', asked: [...this.#asked, { address, bytes: data, isWrite: stop.isWrite }] };
    return this.#stop(pc, stop);
  }

  #fetch(page: bigint, gpa: number): Exclude<Access, { kind: 'ok' }> | null {
    // Two linear pages that are one physical page: only the copy that is used last stays.
    for (const [other, { gpa: same }] of [...this.#pages]) if (same === gpa) this.#drop(other);
    const bytes = new Uint8Array(this.#pageSize);
    const access = this.#bus.read(gpa, bytes);
    if (access.kind !== 'ok') return access;
    this.#engine.map(page, bytes, UC.read | UC.execute);
    this.#pages.set(page, { gpa, writable: false });
    return null;
  }

  #makeWritable(page: bigint, gpa: number, size: number): Exclude<Access, { kind: 'ok' }> | null {
    const old = new Uint8Array(Math.min(size, this.#pageSize - (gpa % this.#pageSize)));
    this.#engine.read(page + BigInt(gpa % this.#pageSize), old);
    const access = this.#bus.write(gpa, old);
    if (access.kind !== 'ok') return access;
    this.#engine.protect(page, this.#pageSize, UC.read | UC.write | UC.execute);
    const entry = this.#pages.get(page);
    if (entry) entry.writable = true;
    return null;
  }

  /** Puts the host's answers where the instruction will look for them. */
  #standIn(): Stop | null {
    for (const { address, bytes, isWrite } of this.#asked) {
      const permissions = UC.read | UC.execute | (isWrite ? UC.write : 0);
      const last = this.#pageOf(address + BigInt(bytes.length) - 1n);
      for (let page = this.#pageOf(address); page <= last; page += BigInt(this.#pageSize)) {
        if (this.#standIns.has(page) || this.#pages.has(page)) this.#engine.protect(page, this.#pageSize, permissions);
        else this.#engine.map(page, new Uint8Array(this.#pageSize), permissions);
        this.#standIns.add(page);
        this.#pages.delete(page);
      }
      if (!isWrite) this.#engine.write(address, bytes);
    }
    return null;
  }

  #leaveStandIns(): void {
    for (const page of this.#standIns) this.#engine.unmap(page, this.#pageSize);
    this.#standIns.clear();
  }

  #port(event: UnicornEvent): Stop {
    const [direction, size] = [event.kind === 'in' ? 'in' : 'out', event.size as 1 | 2 | 4] as const;
    const data = new Uint8Array(size);
    for (const index of data.keys()) data[index] = Number((event.value >> BigInt(8 * index)) & 255n);
    const io = { kind: 'io', direction, port: Number(event.address) & 0xffff, size, data } as const;
    if (direction === 'out' || !(this.#cpu instanceof X86Cpu)) return this.#stop(event.next, io);
    const { opcode, repeated, wide } = this.#prefixes(event.last);
    const isString = opcode === 0x6c || opcode === 0x6d;
    this.pending = { kind: 'in', size, isString };
    const stop = this.#stop(isString ? event.last : event.next, io);
    if (isString) this.#cpu.rewind(size, repeated, wide);
    return stop;
  }

  /** The opcode behind an instruction's prefixes. */
  #prefixes(pc: bigint): { opcode: number; repeated: boolean; wide: boolean } {
    const bytes = new Uint8Array(1);
    let [repeated, wide] = [false, false];
    for (let at = pc; at < pc + 15n; at++) {
      this.#engine.read(at, bytes);
      const [byte = 0] = bytes;
      if (byte === 0xf2 || byte === 0xf3) repeated = true;
      else if (byte === 0x67) wide = true;
      else if (!isPrefix(byte, this.#cpu.mode === UC.mode.long)) return { opcode: byte, repeated, wide };
    }
    return { opcode: 0, repeated, wide };
  }

  #interrupted(vector: number, pc: bigint | null, event: UnicornEvent): bigint | Stop | 'again' {
    if (!(this.#cpu instanceof X86Cpu)) return this.#exception(event);
    const changed = this.#cpu.changedMode(this.#engine);
    this.#stop(pc, { kind: 'hlt' });
    if (changed) return { kind: 'internal-error', suberror: EMULATION };
    if (this.#cpu.mode === UC.mode.real) return this.#cpu.interrupt(vector, this.#bus) ? 'again' : { kind: 'shutdown' };
    if (this.#cpu.interruptTable.limit === 0) return { kind: 'shutdown' };
    return { kind: 'internal-error', suberror: DELIVERY };
  }

  /** arm64: a call of the firmware, or what the guest has no way to take. */
  #exception(event: UnicornEvent): bigint | Stop {
    const instruction = new Uint8Array(4);
    if (this.#pages.has(this.#pageOf(event.last))) this.#engine.read(event.last, instruction);
    if (new DataView(instruction.buffer).getUint32(0, true) !== HVC_0)
      return this.#stop(event.last, { kind: 'internal-error', suberror: DELIVERY });
    const type = systemEvents.get(this.#engine.register(ARM64_X0) & 0xffff_ffffn);
    if (type !== undefined) return this.#stop(event.last + 4n, { kind: 'system-event', type });
    const [number = 0n, ...args] = ARM64_ARGUMENTS.map((register) => this.#engine.register(register));
    const answer = protectedCall(this.#vm, this.#bus, number, args) ?? PSCI_NOT_SUPPORTED;
    if (typeof answer !== 'bigint') {
      const delivered = answer.kind === 'fault' ? answer : { kind: 'internal-error' as const, suberror: DELIVERY };
      return this.#stop(event.last, delivered);
    }
    this.#engine.setRegister(ARM64_X0, answer);
    return event.last + 4n;
  }

  /** Brings registers and memory back to where the host looks for them. */
  #stop(pc: bigint | null, stop: Stop): Stop {
    for (const page of [...this.#pages.keys()]) this.#writeBack(page);
    if (this.#cpu instanceof X86Cpu && this.#cpu.changedMode(this.#engine))
      return { kind: 'internal-error', suberror: EMULATION };
    this.#cpu.store(this.#engine, pc);
    return stop;
  }

  #writeBack(page: bigint): void {
    const entry = this.#pages.get(page);
    if (!entry?.writable) return;
    const bytes = new Uint8Array(this.#pageSize);
    this.#engine.read(page, bytes);
    this.#bus.write(entry.gpa, bytes);
  }

  #drop(page: bigint): void {
    this.#writeBack(page);
    this.#engine.unmap(page, this.#pageSize);
    this.#pages.delete(page);
  }

  /** Linear address of the next instruction by the engine's own register. */
  #programCounter(): bigint {
    if (!(this.#cpu instanceof X86Cpu)) return this.#engine.register(260);
    if (this.#cpu.mode === UC.mode.long) return this.#engine.register(41);
    return (
      (this.#cpu.mode === UC.mode.real ? (this.#engine.register(11) & 0xffffn) << 4n : 0n) + this.#engine.register(26)
    );
  }

  #pageOf(address: bigint): bigint {
    return address - (address % BigInt(this.#pageSize));
  }
}

function answered(asked: readonly Asked[], answer: Uint8Array | null): Asked[] {
  return asked.map((one, index) =>
    index === asked.length - 1 && answer && !one.isWrite ? { ...one, bytes: answer } : one,
  );
}

function isPrefix(byte: number, long: boolean): boolean {
  if (long && byte >= 0x40 && byte <= 0x4f) return true;
  return [0x66, 0x67, 0xf0, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65].includes(byte);
}

function stopOf(
  access: Exclude<Access, { kind: 'ok' }>,
  what: { readonly gpa: number; readonly isWrite: boolean; readonly data: Uint8Array } | null,
): Stop {
  if (access.kind === 'fault') return access;
  return what ? { kind: 'mmio', ...what } : { kind: 'internal-error', suberror: EMULATION };
}
