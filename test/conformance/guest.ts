import { enter, gdt, usesVmmcall } from '../../lib/agent/machine_setup.ts';
import { PageTables } from '../../lib/agent/page_tables.ts';
import {
  AGENT_SIZE,
  agentCode,
  BUFFER_SIZE,
  COMMAND,
  DOORBELL,
  LAYOUT,
  MAILBOX,
  PORT,
  TABLE_PAGES,
} from '../../lib/agent/protocol.ts';
import { type RegisterFile, registerFile } from '../../lib/registers.ts';
import { ERRNO, GiB, KVM_EXIT, MiB } from '../../lib/uapi.ts';
import { initialise } from '../../lib/vcpu_setup.ts';
import { patience } from '../pace.ts';
import type { Expected, Outcome, Scenario } from './scenario.ts';

/** Guest physical, out of the way of a case's own slots. */
const HOME = 512 * MiB;
const HOME_SLOT = 31;
/** arm64: where no case puts memory. */
const DOORBELL_AT = 3 * GiB;
/** Milliseconds. What takes longer does not come back. */
const DEADLINE = 5000 * patience;
/** Exits that one instruction can leave to be completed. */
const COMPLETIONS = 16;

// ── what an access can come to, besides the byte that was read and 0 for a write

/** An exit with memory_fault: the access, and the page it was to. */
export const fault = (access: 'private' | 'shared', page: number): Expected => [
  'EFAULT',
  KVM_EXIT.MEMORY_FAULT,
  access === 'private' ? 8 : 0,
  page,
  1,
];
/** KVM_RUN fails and kvm_run does not say why. */
export const unexplained: Expected = ['EFAULT', KVM_EXIT.UNKNOWN];
export const mmioRead = (page: number): Expected => ['MMIO read', page];
export const mmioWrite = (page: number, value: number): Expected => ['MMIO write', page, value];

/** VMCALL, or VMMCALL where the CPU has that. */
export function hypercallCode(s: Scenario): readonly number[] {
  return [0x0f, 0x01, usesVmmcall(s.kernel) ? 0xd9 : 0xc1];
}

/** Where the guest's code is, as a page number. */
export function codePage(s: Scenario): number {
  return Math.floor((HOME + LAYOUT.code) / s.P);
}

export function exitReason(runPage: Uint8Array): number {
  return viewOf(runPage).getUint32(8, true);
}

/**
 * A guest that reads and writes what a case says: the guest agent, at the boundary, so that a case sees what KVM_RUN returned and what kvm_run
 * says. With code of its own it runs that instead, in 64-bit mode with every address mapped to itself.
 */
export class Guest {
  readonly vm: number;
  readonly vcpu: number;
  readonly #s: Scenario;
  readonly #memory: number;
  readonly #tables: PageTables;
  readonly #enter: () => void;
  readonly #registers: RegisterFile;
  readonly #vmmcall: bigint;
  readonly #run: DataView;
  readonly #hasAgent: boolean;
  /** Bytes of a page that the agent shares with the host, where the VM is a protected one: it alone has no read-only memory. */
  readonly #share: number;
  /** The agent is behind its doorbell. */
  #waiting = false;
  /** What the command in progress is to answer. */
  #finish: () => Outcome = () => 0;

  constructor(s: Scenario, vm: number, code?: readonly number[]) {
    const { kernel } = s;
    const { bytes, start } = agentCode(kernel.arch);
    this.#s = s;
    this.vm = vm;
    this.#memory = s.anonymous(AGENT_SIZE / s.P);
    const hva = kernel.addressOf(this.#memory);
    if (s.slot(vm, { slot: HOME_SLOT, at: HOME / s.P, pages: AGENT_SIZE / s.P, hva }) !== 0)
      throw new Error('setup: no slot for the guest');
    this.vcpu = s.vcpu(vm);
    this.#run = viewOf(kernel.runPage(this.vcpu));
    this.#registers = registerFile(kernel, this.vcpu, (result, request) => {
      if (result < 0) throw new Error(`setup: ${request}: ${result}`);
      return result;
    });
    const setupVcpu = {
      handle: { kernel, fd: this.vcpu },
      setRegisters: (values: Readonly<Record<string, bigint>>) => this.#registers.set(values),
    };
    initialise(kernel, vm, this.vcpu);
    this.#vmmcall = usesVmmcall(kernel) ? 1n : 0n;
    this.#share = s.cap(vm, 'READONLY_MEM') === 0 ? s.P : 0;
    this.#poke(LAYOUT.code, code ? Uint8Array.from(code) : bytes);
    this.#poke(LAYOUT.descriptors, new Uint8Array(gdt.buffer));
    const pool = { address: HOME + LAYOUT.tables, pages: TABLE_PAGES };
    this.#tables = new PageTables(kernel.arch, pool, (at, data) => this.#poke(at - HOME, data));
    this.#map(0);
    this.#enter = () => enter(setupVcpu, HOME, code ? 0 : start, this.#tables.root);
    this.#hasAgent = !code;
    if (code) this.#enter();
    else this.#comeBack();
  }

  /** The byte that the guest reads in a page, or what its access came to. */
  get(page: number, offset = 0): Outcome {
    const address = page * this.#s.P + offset;
    return this.#command(COMMAND.read, address, 1, [], () => this.#peek(bufferOf(address), 1).getUint8(0));
  }
  /** The guest writes a byte to a page: 0, or what its access came to. */
  put(page: number, value: number, offset = 0): Outcome {
    const address = page * this.#s.P + offset;
    this.#poke(bufferOf(address), Uint8Array.of(value));
    return this.#command(COMMAND.write, address, 1);
  }
  /** What the guest gets as the hypercall's result, or the exit. */
  hypercall(...args: readonly bigint[]): Outcome {
    return this.#command(COMMAND.hypercall, 0, 0, args, () => this.#peek(MAILBOX.result, 8).getBigInt64(0, true));
  }
  /** Runs on after what stopped the access: KVM tries it again, or completes it. */
  again(): Outcome {
    for (;;) {
      const result = this.#s.kernel.run(this.vcpu, DEADLINE);
      if (result < 0 || !this.#hasAgent || this.#doorbell() !== DOORBELL.ready) return this.#stop(result);
      if (this.#peek(MAILBOX.command, 8).getBigUint64(0, true) !== 0n) continue;
      this.#waiting = true;
      return this.#finish();
    }
  }
  /** Runs the machine code with these registers and a page mapped that it uses. */
  execute(registers: Readonly<Record<string, bigint>>, page = 0): Outcome {
    this.#map(page * this.#s.P);
    this.#registers.set(registers);
    return this.again();
  }

  register(name: string): bigint {
    return this.#registers.get()[name] ?? 0n;
  }

  /** The answer to an MMIO read, before the guest runs on. */
  answer(value: number): void {
    this.#run.setUint8(40, value);
  }
  /** The answer to a hypercall. */
  reply(value: bigint): void {
    this.#run.setBigInt64(88, value, true);
  }
  set immediateExit(on: boolean) {
    this.#run.setUint8(1, on ? 1 : 0);
  }
  get exitReason(): number {
    return this.#run.getUint32(8, true);
  }
  /** A word of the union in kvm_run. */
  word(index: number): bigint {
    return this.#run.getBigUint64(32 + 8 * index, true);
  }
  setWord(index: number, value: bigint): void {
    this.#run.setBigUint64(32 + 8 * index, value, true);
  }

  #command(
    command: number,
    address: number,
    size: number,
    args: readonly bigint[] = [],
    finish: () => Outcome = () => 0,
  ): Outcome {
    if (!this.#waiting) this.#comeBack();
    this.#map(address);
    this.#mailbox(command, address, size, args);
    this.#waiting = false;
    this.#finish = finish;
    return this.again();
  }

  /** Completes what is pending, as KVM does before it looks at registers, then starts the agent anew. */
  #comeBack(): void {
    const { kernel } = this.#s;
    for (let count = 0; count < COMPLETIONS && kernel.run(this.vcpu, 0) !== -ERRNO.EINTR; count++);
    this.#mailbox(COMMAND.none, 0, 0, []);
    this.#enter();
    const result = kernel.run(this.vcpu, DEADLINE);
    if (result < 0 || this.#doorbell() !== DOORBELL.ready)
      throw new Error(`setup: the guest does not start: ${result}, exit reason ${this.exitReason}`);
    this.#waiting = true;
  }

  #map(address: number): void {
    const doorbell = this.#s.kernel.arch === 'aarch64' ? [{ address: DOORBELL_AT, size: 4 }] : [];
    this.#tables.map({ address: HOME, size: AGENT_SIZE }, ...doorbell, { address, size: 1 });
  }

  #mailbox(command: number, address: number, size: number, args: readonly bigint[]): void {
    const words = new DataView(new ArrayBuffer(MAILBOX.end));
    const set = (offset: number, value: bigint): void => words.setBigUint64(offset, value, true);
    set(MAILBOX.command, BigInt(command));
    set(MAILBOX.address, BigInt(address));
    set(MAILBOX.size, BigInt(size));
    for (const [index, value] of args.entries()) set(MAILBOX.args + 8 * index, value);
    set(MAILBOX.tables, BigInt(this.#tables.root));
    set(MAILBOX.vmmcall, this.#vmmcall);
    set(MAILBOX.doorbell, BigInt(DOORBELL_AT));
    set(MAILBOX.share, BigInt(this.#share));
    this.#poke(LAYOUT.mailbox, new Uint8Array(words.buffer));
  }

  /** What the agent's doorbell says, if this exit is it. */
  #doorbell(): number | null {
    const run = this.#run;
    if (this.#s.kernel.arch === 'aarch64') {
      const rung = this.exitReason === KVM_EXIT.MMIO && this.word(0) === BigInt(DOORBELL_AT);
      return rung ? run.getUint32(40, true) : null;
    }
    const rung = this.exitReason === KVM_EXIT.IO && run.getUint16(34, true) === PORT;
    return rung ? run.getUint32(Number(run.getBigUint64(40, true)), true) : null;
  }

  #stop(result: number): Outcome {
    const run = this.#run;
    const { P } = this.#s;
    const reason = this.exitReason;
    if (result < 0) {
      if (reason !== KVM_EXIT.MEMORY_FAULT) return [result, reason];
      return [result, reason, this.word(0), Number(this.word(1)) / P, Number(this.word(2)) / P];
    }
    if (reason === KVM_EXIT.MMIO) {
      const page = Math.floor(Number(this.word(0)) / P);
      return run.getUint8(52) ? ['MMIO write', page, run.getUint8(40)] : ['MMIO read', page];
    }
    if (reason === KVM_EXIT.IO) return ['port', run.getUint16(34, true), run.getUint8(Number(this.word(1)))];
    if (reason === KVM_EXIT.HYPERCALL) return ['hypercall', this.word(0), this.word(1), this.word(2), this.word(3)];
    return ['exit', reason];
  }

  #peek(offset: number, size: number): DataView {
    const bytes = new Uint8Array(size);
    if (this.#s.kernel.peek(this.#memory, offset, bytes) !== size) throw new Error('setup: cannot read guest memory');
    return viewOf(bytes);
  }
  #poke(offset: number, bytes: Uint8Array): void {
    if (this.#s.kernel.poke(this.#memory, offset, bytes) !== bytes.length)
      throw new Error('setup: cannot write guest memory');
  }
}

function bufferOf(address: number): number {
  return LAYOUT.buffer + (address % BUFFER_SIZE);
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
