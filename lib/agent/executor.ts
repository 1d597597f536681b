import type { Access, Executor, ExecutorFactory, GuestBus, Stop } from '../kernel/software/executor.ts';
import { MEM_SHARE, protectedCall } from '../kernel/software/protected_calls.ts';
import type { SoftwareVcpu } from '../kernel/software/vcpu.ts';
import type { Arch } from '../model_options.ts';
import { ERRNO, KiB, KVM_GET_REGS, KVM_REGS, MiB } from '../uapi.ts';
import { DESCRIPTORS } from './page_tables.ts';
import { AGENT_SIZE, agentCode, BUFFER_SIZE, COMMAND, DOORBELL, LAYOUT, MAILBOX, PORT } from './protocol.ts';

const CODE_PAGE = 4 * KiB;
const RIP = 8 * KVM_REGS.indexOf('rip');
/** ONE_REG id of the arm64 program counter. */
const PC = 0x6030_0000_0010_0040n;
const KVM_HC_VAPIC_POLL_IRQ = 1n;
const KVM_HC_MAP_GPA_RANGE = 12n;
const [KVM_EPERM, KVM_ENOSYS] = [-1n, -1000n];
const PSCI_SYSTEM_OFF = 0x8400_0008n;
const KVM_SYSTEM_EVENT_SHUTDOWN = 1;
const MASK_64 = (1n << 64n) - 1n;
/** ESR_EL1 of a translation fault of EL1's own data access, but for the level of the table, in bits 1:0. */
const TRANSLATION_FAULT = 0x9600_0004;
/** The same of an abort that comes from outside. */
const EXTERNAL_ABORT = 0x9600_0010;

type Answer = Uint8Array | bigint | null;
/** A piece of guest code: it yields when it cannot go on without the host, and gets the host's answer. */
type Steps<T> = Generator<Stop, T, Answer>;

const codes = { x86_64: agentCode('x86_64'), aarch64: agentCode('aarch64') } as const;

/**
 * Recognizes the guest agent at a vCPU's program counter, and does what its machine code does, to the same addresses in the same order, with
 * the same faults, exits and dirty pages; only whole pages at a time where nothing can tell the difference.
 */
export const agentExecutors: ExecutorFactory = {
  open(vcpu: SoftwareVcpu, bus: GuestBus): Executor | null {
    const { arch } = vcpu.vm.machine;
    const code = codes[arch];
    const pc = Number(programCounter(vcpu));
    const offset = pc % CODE_PAGE;
    const page = pc - offset;
    if ((offset !== code.start && offset !== code.resume) || page < LAYOUT.code) return null;
    const found = new Uint8Array(code.bytes.length);
    if (bus.read(page, found).kind !== 'ok' || Buffer.compare(found, code.bytes) !== 0) return null;
    return new AgentExecutor(vcpu, page - LAYOUT.code, offset === code.resume);
  },
};

function programCounter(vcpu: SoftwareVcpu): bigint {
  const bytes = vcpu.vm.machine.isArm ? vcpu.registers.get(PC) : vcpu.structs.get(KVM_GET_REGS)?.subarray(RIP);
  return bytes ? new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true) : 0n;
}

/** An exception that the guest takes at an address. */
class GuestException {
  readonly address: number;
  /** arm64: what ESR_EL1 says. */
  readonly syndrome: number;

  constructor(address: number, syndrome: number) {
    this.address = address;
    this.syndrome = syndrome;
  }
}

class AgentExecutor implements Executor {
  readonly #vcpu: SoftwareVcpu;
  readonly #arch: Arch;
  readonly #agent: number;
  readonly #steps: Steps<never>;
  #bus: GuestBus | null = null;
  #expired: () => boolean = () => true;
  /** 2 MiB blocks that the tables in use map. */
  readonly #mapped = new Set<number>();
  #root = 0n;
  readonly #page: Uint8Array;

  constructor(vcpu: SoftwareVcpu, agent: number, resumed: boolean) {
    this.#vcpu = vcpu;
    this.#arch = vcpu.vm.machine.arch;
    this.#agent = agent;
    this.#page = new Uint8Array(vcpu.vm.machine.pageSize);
    this.#steps = this.#loop(resumed);
  }

  run(_vcpu: SoftwareVcpu, bus: GuestBus, answer: Answer, expired: () => boolean): Stop {
    this.#bus = bus;
    this.#expired = expired;
    return this.#steps.next(answer).value;
  }

  *#loop(resumed: boolean): Steps<never> {
    let doorbell: number | null = resumed ? null : DOORBELL.ready;
    let starts = !resumed && this.#arch === 'aarch64';
    for (;;) {
      try {
        const isFirst = starts;
        starts = false;
        if (isFirst) yield* this.#share();
        if (doorbell !== null) yield* this.#ring(doorbell);
        doorbell = DOORBELL.ready;
        yield* this.#command();
      } catch (thrown) {
        if (!(thrown instanceof GuestException)) throw thrown;
        yield* this.#exception(thrown);
        doorbell = DOORBELL.exception;
      }
    }
  }

  /** What the agent does before anything else. */
  *#share(): Steps<void> {
    yield* this.#fetch();
    const pageSize = Number(yield* this.#word(MAILBOX.share));
    if (pageSize === 0) return;
    for (let offset = 0; offset < AGENT_SIZE; offset += pageSize)
      yield* this.#firmware(MEM_SHARE, [BigInt(this.#agent + offset), 0n, 0n]);
  }

  /** HVC, tried again after each exit that it needs first. */
  *#firmware(number: bigint, args: readonly bigint[]): Steps<bigint> {
    for (;;) {
      yield* this.#alive();
      const answer = protectedCall(this.#vcpu.vm, this.#busy, number, args);
      if (answer === null) return KVM_EPERM & MASK_64;
      if (typeof answer === 'bigint') return answer & MASK_64;
      // It cannot be answered like an access: KVM does not know which instruction it was.
      if (answer.kind === 'mmio') throw new GuestException(0, EXTERNAL_ABORT);
      yield answer;
    }
  }

  /** The code between the doorbell and the next one. */
  *#command(): Steps<void> {
    yield* this.#fetch();
    this.#root = yield* this.#word(MAILBOX.tables);
    this.#mapped.clear();
    const address = Number(yield* this.#word(MAILBOX.address));
    const size = Number(yield* this.#word(MAILBOX.size));
    const arg0 = yield* this.#word(MAILBOX.args);
    const buffer = this.#agent + LAYOUT.buffer + (address % BUFFER_SIZE);
    switch (Number(yield* this.#word(MAILBOX.command))) {
      case COMMAND.read:
        yield* this.#copy(address, buffer, size);
        break;
      case COMMAND.write:
        yield* this.#copy(buffer, address, size);
        break;
      case COMMAND.fill:
        yield* this.#fill(address, size, Number(arg0 & 0xffn));
        break;
      case COMMAND.checksum:
        yield* this.#store64(MAILBOX.result, yield* this.#checksum(address, size, arg0));
        break;
      case COMMAND.compareAndSwap:
        yield* this.#store64(MAILBOX.result, yield* this.#compareAndSwap(address, arg0));
        break;
      case COMMAND.touch:
        yield* this.#touch(address, size, Number(arg0));
        break;
      case COMMAND.hypercall:
        yield* this.#store64(MAILBOX.result, yield* this.#hypercall(arg0));
        break;
      case COMMAND.halt:
        yield* this.#store64(MAILBOX.command, 0n);
        yield this.#arch === 'x86_64' ? { kind: 'hlt' } : { kind: 'system-event', type: KVM_SYSTEM_EVENT_SHUTDOWN };
        return;
      case COMMAND.ask:
        yield* this.#ring(DOORBELL.ask);
        break;
      default:
        return;
    }
    yield* this.#store64(MAILBOX.command, 0n);
  }

  *#copy(source: number, target: number, size: number): Steps<void> {
    const delta = target - source;
    for (let at = source; at < source + size; ) {
      const piece = yield* this.#load(at, source + size, true);
      for (let done = 0; done < piece.length; ) {
        const bytes = piece.subarray(done);
        done += yield* this.#store(at + delta + done, bytes, true);
      }
      at += piece.length;
    }
  }

  *#fill(address: number, size: number, byte: number): Steps<void> {
    const page = new Uint8Array(this.#page.length).fill(byte);
    for (let at = address; at < address + size; ) {
      at += yield* this.#store(at, page.subarray(0, Math.min(page.length, address + size - at)), true);
    }
  }

  *#checksum(address: number, size: number, start: bigint): Steps<bigint> {
    let sum = start;
    const add = (word: bigint): void => {
      sum = (((sum << 5n) | (sum >> 59n)) + word) & MASK_64;
    };
    const last = new DataView(new ArrayBuffer(8));
    let filled = 0;
    for (let at = address; at < address + size; ) {
      const piece = yield* this.#load(at, address + size, address % 8 === 0);
      at += piece.length;
      const view = new DataView(piece.buffer, piece.byteOffset, piece.length);
      let done = 0;
      for (; done < piece.length; ) {
        if (filled === 0 && piece.length - done >= 8) {
          add(view.getBigUint64(done, true));
          done += 8;
          continue;
        }
        last.setUint8(filled++, piece[done++] as number);
        if (filled < 8) continue;
        add(last.getBigUint64(0, true));
        last.setBigUint64(0, 0n);
        filled = 0;
      }
    }
    if (filled > 0) add(last.getBigUint64(0, true));
    return sum;
  }

  *#compareAndSwap(address: number, expected: bigint): Steps<bigint> {
    const replacement = yield* this.#word(MAILBOX.args + 8);
    const isArm = this.#arch === 'aarch64';
    // KVM cannot tell what an exclusive access of arm64 was, where there is no memory.
    const access = (bytes: Uint8Array, write: boolean): Steps<Uint8Array> => this.#access(address, bytes, write, isArm);
    const bytes = yield* access(new Uint8Array(8), false);
    const view = new DataView(bytes.buffer, bytes.byteOffset);
    const found = view.getBigUint64(0, true);
    if (found === expected) view.setBigUint64(0, replacement, true);
    // x86 writes in any case: what was there.
    if (found === expected || !isArm) yield* access(bytes, true);
    return found;
  }

  *#touch(address: number, size: number, pageSize: number): Steps<void> {
    const write = (yield* this.#word(MAILBOX.args + 8)) !== 0n;
    for (let at = address; at < address + size; at += pageSize - (at % pageSize)) {
      yield* this.#alive();
      const byte = yield* this.#access(at, new Uint8Array(1), false);
      if (write) yield* this.#access(at, byte, true);
    }
  }

  /** What KVM answers, or asks its user. Contract §15. */
  *#hypercall(number: bigint): Steps<bigint> {
    const args: bigint[] = [];
    for (let index = 1; index <= 4; index++) args.push(yield* this.#word(MAILBOX.args + 8 * index));
    const { vm } = this.#vcpu;
    if (this.#arch === 'aarch64') {
      if (BigInt.asUintN(32, number) === PSCI_SYSTEM_OFF)
        yield { kind: 'system-event', type: KVM_SYSTEM_EVENT_SHUTDOWN };
      return yield* this.#firmware(number, args);
    }
    // Where guest code is emulated, the instruction is tried for ever.
    if (!vm.machine.tdp) for (;;) yield* this.#alive();
    if (number === KVM_HC_VAPIC_POLL_IRQ) return 0n;
    if (number !== KVM_HC_MAP_GPA_RANGE || !(vm.hypercallMask & (1 << Number(KVM_HC_MAP_GPA_RANGE))))
      return KVM_ENOSYS & MASK_64;
    const [gpa = 0n, pages = 0n] = args;
    if (gpa % 4096n || pages === 0n || (gpa >> 12n) + pages > MASK_64) return BigInt.asUintN(64, -22n);
    const answer = yield { kind: 'hypercall', number, args: args.slice(0, 3), longMode: true };
    return typeof answer === 'bigint' ? answer : 0n;
  }

  *#exception({ address, syndrome }: GuestException): Steps<void> {
    if (this.#arch === 'x86_64') for (;;) yield { kind: 'shutdown' };
    yield* this.#store64(MAILBOX.result, BigInt(syndrome));
    yield* this.#store64(MAILBOX.args, BigInt(address));
    yield* this.#store64(MAILBOX.command, 0n);
  }

  *#ring(value: number): Steps<void> {
    yield* this.#alive();
    yield* this.#fetch();
    const data = new Uint8Array(4);
    new DataView(data.buffer).setUint32(0, value, true);
    const doorbell = this.#arch === 'aarch64' ? Number(yield* this.#word(MAILBOX.doorbell)) : 0;
    this.#setProgramCounter(codes[this.#arch].resume);
    if (this.#arch === 'x86_64') yield { kind: 'io', direction: 'out', port: PORT, size: 4, data };
    else yield* this.#access(doorbell, data, true, false, false);
  }

  #setProgramCounter(offset: number): void {
    const bytes = new Uint8Array(8);
    new DataView(bytes.buffer).setBigUint64(0, BigInt(this.#agent + LAYOUT.code + offset), true);
    if (this.#arch === 'aarch64') this.#vcpu.registers.set(PC, bytes);
    else this.#vcpu.structs.get(KVM_GET_REGS)?.set(bytes, RIP);
  }

  /** The code page must be there whenever code runs. */
  *#fetch(): Steps<void> {
    yield* this.#access(this.#agent + LAYOUT.code, new Uint8Array(1), false, false, false);
  }

  *#word(offset: number): Steps<bigint> {
    const bytes = yield* this.#access(this.#agent + offset, new Uint8Array(8), false, false, false);
    return new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true);
  }

  *#store64(offset: number, value: bigint): Steps<void> {
    const bytes = new Uint8Array(8);
    new DataView(bytes.buffer).setBigUint64(0, value, true);
    yield* this.#access(this.#agent + offset, bytes, true, false, false);
  }

  /** Time may run out between any two instructions. */
  *#alive(): Steps<void> {
    while (this.#expired()) yield { kind: 'deadline' };
  }

  /** Reads from `at` to the end of its page, or to `end`; of what is no memory, as much as one instruction does. */
  *#load(at: number, end: number, words: boolean): Steps<Uint8Array> {
    for (;;) {
      yield* this.#alive();
      yield* this.#translate(at);
      const target = this.#page.subarray(0, Math.min(end, this.#pageEnd(at)) - at);
      const access = this.#busy.read(at, target);
      if (access.kind === 'ok') return target;
      const exit = stopOf(access, at, new Uint8Array(width(at, target.length, words)), false);
      const answer = yield exit;
      if (exit.kind === 'mmio') return answer instanceof Uint8Array ? answer : exit.data;
    }
  }

  /** Writes up to the end of the page at `at`; to what is no memory, as much as one instruction does. @returns how much that was. */
  *#store(at: number, bytes: Uint8Array, words: boolean): Steps<number> {
    for (;;) {
      yield* this.#alive();
      yield* this.#translate(at);
      const source = bytes.subarray(0, Math.min(bytes.length, this.#pageEnd(at) - at));
      const access = this.#busy.write(at, source);
      if (access.kind === 'ok') return source.length;
      const exit = stopOf(access, at, source.slice(0, width(at, source.length, words)), true);
      yield exit;
      if (exit.kind === 'mmio') return exit.data.length;
    }
  }

  /** One instruction's access, inside a page. */
  *#access(at: number, bytes: Uint8Array, write: boolean, memoryOnly = false, translated = true): Steps<Uint8Array> {
    for (;;) {
      if (translated) yield* this.#translate(at);
      const access = write ? this.#busy.write(at, bytes) : this.#busy.read(at, bytes);
      if (access.kind === 'ok') return bytes;
      const exit = stopOf(access, at, bytes.slice(), write);
      if (exit.kind === 'mmio' && memoryOnly) {
        yield { kind: 'fault', errno: ERRNO.ENOSYS, fault: null };
        continue;
      }
      const answer = yield exit;
      if (exit.kind === 'mmio') return !write && answer instanceof Uint8Array ? answer : bytes;
    }
  }

  /** Walks the guest's page tables as its CPU would: they must map every address to itself. */
  *#translate(at: number): Steps<void> {
    const block = Math.floor(at / (2 * MiB));
    if (this.#mapped.has(block)) return;
    const { valid, isTable } = DESCRIPTORS[this.#arch];
    let table = this.#root;
    for (const [level, shift] of [39n, 30n, 21n].entries()) {
      const index = Number((BigInt(at) >> shift) & 511n);
      const bytes = yield* this.#access(Number(table) + 8 * index, new Uint8Array(8), false, false, false);
      const entry = new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true);
      if (!(entry & valid) || isTable(entry) !== shift > 21n) throw new GuestException(at, TRANSLATION_FAULT + level);
      table = entry & 0x000f_ffff_ffff_f000n;
    }
    if (Number(table) !== block * 2 * MiB) throw new GuestException(at, TRANSLATION_FAULT + 2);
    this.#mapped.add(block);
  }

  get #busy(): GuestBus {
    if (!this.#bus) throw new Error('the executor does not run');
    return this.#bus;
  }

  #pageEnd(at: number): number {
    return at - (at % this.#page.length) + this.#page.length;
  }
}

/** How much one instruction of the agent accesses at an address: an aligned word where there is one, or a byte. */
function width(at: number, left: number, words: boolean): number {
  return words && at % 8 === 0 && left >= 8 ? 8 : 1;
}

function stopOf(
  access: Exclude<Access, { kind: 'ok' }>,
  gpa: number,
  data: Uint8Array,
  isWrite: boolean,
): Extract<Stop, { kind: 'mmio' | 'fault' }> {
  return access.kind === 'fault' ? access : { kind: 'mmio', gpa, isWrite, data };
}
