import { constants } from 'node:buffer';
import { KvmError } from '../errors.ts';
import type { Exit, MapGpaRangeExit } from '../exit.ts';
import { formatRange, hex } from '../format.ts';
import type { GuestRange, Visibility } from '../guest_range.ts';
import { bytes } from '../kernel/arguments.ts';
import type { Memslot } from '../memslot.ts';
import { guardConstructor, internal } from '../resource.ts';
import { ERRNO, GiB, KiB, KVM_CAP } from '../uapi.ts';
import { boolean, guestRange, integer, oneOf, options, rangeError, typeError } from '../validate.ts';
import { Vcpu } from '../vcpu.ts';
import { Vm } from '../vm.ts';
import { enter, gdt, usesVmmcall } from './machine_setup.ts';
import { PageTables } from './page_tables.ts';
import {
  ADDRESS_BITS,
  AGENT_SIZE,
  agentCode,
  BUFFER_SIZE,
  COMMAND,
  DOORBELL,
  LAYOUT,
  MAILBOX,
  PORT,
  TABLE_PAGES,
} from './protocol.ts';

export type ExitHandler = (exit: Exit) => 'resume' | 'stop';

export interface AgentOptions {
  /**
   * Guest physical address of the 128 KiB the agent lives in, page-aligned, in memory that guest and host share; the first place for it when
   * omitted. From its start: mailbox (4 KiB), code (4 KiB), descriptor table and stack (4 KiB), page tables (52 KiB), data buffer (64 KiB).
   */
  readonly address?: number;
  /**
   * A vCPU of the VM that has not run yet; a new one unless given. It is the agent's from then on. A host with protected KVM wants every vCPU
   * of a VM created before the first one runs: there create all of them, and then boot.
   */
  readonly vcpu?: Vcpu;
  /**
   * Called for each exit of the vCPU that is not the agent's own: MMIO, a memory fault, a request for a conversion … 'resume' runs the guest
   * on, after the handler repaired or answered what it is about; 'stop' ends the command with an error that says what happened, and so does
   * having no handler. The exit is good until the handler returns.
   */
  readonly onExit?: ExitHandler;
  /** Milliseconds for one entry of the guest; 10 000 unless given. A command enters once for each 64 to 256 KiB. */
  readonly timeout?: number;
}

export interface TouchOptions {
  /** Also write the byte back. Default false. */
  readonly write?: boolean;
  /** Bytes from one touch to the next, a power of two; the host's page size unless given. */
  readonly pageSize?: number;
}

interface Command {
  readonly command: number;
  readonly address?: number;
  readonly size?: number;
  readonly args?: readonly bigint[];
}

/** What boot() found out. */
interface Settled {
  readonly place: number;
  readonly onExit: ExitHandler | null;
  readonly timeout: number;
  readonly conversionBy: 'hypercall' | 'doorbell';
}

const KVM_HC_MAP_GPA_RANGE = 12n;
const ENCRYPTED = 0x10n;
/** A piece of work of one entry: on a host that emulates guest code it takes a tenth of a second. */
const PIECE = 256 * KiB;
const TOUCHES = 65536;
const GUEST_PAGE = 4 * KiB;
const DOORBELL_SIZE = 4;
/** Exits that one instruction can leave to be completed. */
const COMPLETIONS = 16;

/** Exits in the middle of an instruction, which the next run completes. */
const unanswered: readonly Exit['reason'][] = ['io', 'mmio', 'hypercall', 'map-gpa-range'];

const agentsOf = new WeakMap<Vm, Set<GuestAgent>>();

/**
 * Guest code that does what the host script says, by real accesses of a real CPU, or of the software kernel's: so both sides of an experiment are
 * one TypeScript program. It is a vCPU of its own in 64-bit kernel mode with identity paging; addresses are guest physical ones, of any
 * alignment, up to 2^46 on x86_64 and the VM's limit on aarch64. In a protected VM it shares its own 128 KiB with the host, by the call that
 * such guests have for it, and what it reads and writes elsewhere becomes the guest's alone: hypercall(0xc6000003n, [address]) shares a page
 * more, 0xc6000004n takes it back.
 *
 * A method blocks this thread until the guest has done it. It throws, besides what it says: KvmError `EFAULT` the access reached no memory
 * (`errorOffset` is the address), and bytes before it may have been accessed · `ETIMEDOUT` the guest did not come back · `EINTR` it was kicked ·
 * `EIO` it crashed or did what nobody handles · `EBUSY` from within its own onExit, or a write to an agent's memory · `ERR_CLOSED`. The agent can
 * be used again after each but the last.
 */
export class GuestAgent implements Disposable {
  readonly vcpu: Vcpu;
  /** Guest physical address of its 128 KiB. */
  readonly address: number;
  /**
   * How requestConversion() reaches the VMM: by KVM's MAP_GPA_RANGE hypercall, or where there is none, or where it would never leave the
   * guest, by the agent's own doorbell. onExit sees the same exit.
   */
  readonly conversionBy: 'hypercall' | 'doorbell';
  readonly #vm: Vm;
  readonly #onExit: ExitHandler | null;
  readonly #timeout: number;
  readonly #entry: number;
  readonly #limit: number;
  readonly #vmmcall: bigint;
  readonly #tables: PageTables;
  /** aarch64: an address without memory. */
  #doorbell = 0;
  /** The guest waits behind its doorbell for a command. */
  #waiting = false;
  /** The guest is in the middle of an instruction whose exit stopped a command. */
  #unanswered = false;
  #busy = false;
  #halted = false;
  #closed = false;

  /**
   * Puts the agent into guest memory, starts it on a new vCPU, and returns when it waits for commands.
   *
   * @throws KvmError `EFAULT` its place is not memory that guest and host share · `EBUSY` another agent is there · `UNSUPPORTED` no place is left ·
   *   `ERR_CLOSED` · what vm.createVcpu() throws
   */
  static boot(vm: Vm, given: AgentOptions = {}): GuestAgent {
    if (!(vm instanceof Vm)) throw typeError('vm must be a Vm');
    const { address, vcpu: mine, onExit, timeout = 10_000 } = options('options', given);
    if (onExit !== undefined && typeof onExit !== 'function') throw typeError('onExit must be a function');
    if (typeof timeout !== 'number') throw typeError('timeout must be a number');
    if (mine !== undefined && !(mine instanceof Vcpu && mine.handle.vm === vm))
      throw typeError('vcpu must be a Vcpu of the VM');
    if ([...(agentsOf.get(vm) ?? [])].some(({ vcpu }) => vcpu === mine))
      throw failed('EBUSY', ERRNO.EBUSY, 'boot', null, { why: 'the vCPU is another agent’s' });
    const conversionBy = hypercallsExit(vm) ? 'hypercall' : 'doorbell';
    const place = address === undefined ? freePlace(vm) : takenPlace(vm, address);
    const vcpu = mine ?? vm.createVcpu();
    try {
      return new GuestAgent(internal, vm, vcpu, { place, onExit: onExit ?? null, timeout, conversionBy });
    } catch (error) {
      if (!mine) vcpu.close();
      throw error;
    }
  }

  /** @internal */
  constructor(token: typeof internal, vm: Vm, vcpu: Vcpu, settled: Settled) {
    guardConstructor(token, 'GuestAgent.boot()');
    const { arch } = vm.kvm;
    const { bytes: code, start } = agentCode(arch);
    const { place: address } = settled;
    this.vcpu = vcpu;
    this.address = settled.place;
    this.conversionBy = settled.conversionBy;
    this.#vm = vm;
    this.#onExit = settled.onExit;
    this.#timeout = settled.timeout;
    this.#entry = start;
    this.#limit = 2 ** ADDRESS_BITS[arch];
    this.#vmmcall = usesVmmcall(vm.backing.kernel) ? 1n : 0n;
    vm.memory.write(address, new Uint8Array(AGENT_SIZE));
    vm.memory.write(address + LAYOUT.code, code);
    vm.memory.write(address + LAYOUT.descriptors, new Uint8Array(gdt.buffer));
    const pool = { address: address + LAYOUT.tables, pages: TABLE_PAGES };
    this.#tables = new PageTables(arch, pool, (at, data) => vm.memory.write(at, data));
    this.#comeBack();
    const agents = agentsOf.get(vm) ?? new Set();
    agentsOf.set(vm, agents.add(this));
  }

  get closed(): boolean {
    return this.#closed || this.vcpu.closed;
  }

  /** What the guest reads at [address, +length). */
  read(address: number, length: number): Uint8Array {
    integer('length', length, 0, constants.MAX_LENGTH);
    this.#assertReach(address, length);
    const target = new Uint8Array(length);
    for (const { at, size } of pieces(address, length, BUFFER_SIZE)) {
      this.#carryOut({ command: COMMAND.read, address: at, size }, 'read', { address, size: length });
      this.#vm.memory.readInto(this.#buffer(at), target.subarray(at - address, at - address + size));
    }
    return target;
  }

  /** The guest writes `data` to [address, +data.length). */
  write(address: number, data: Uint8Array): void {
    const plain = bytes('data', data);
    this.#assertReach(address, plain.length);
    this.#assertForeign(address, plain.length);
    for (const { at, size } of pieces(address, plain.length, BUFFER_SIZE)) {
      this.#assertIdle();
      this.#vm.memory.write(this.#buffer(at), plain.subarray(at - address, at - address + size));
      this.#carryOut({ command: COMMAND.write, address: at, size }, 'write', { address, size: plain.length });
    }
  }

  /** The guest writes the same byte everywhere. */
  fill(range: GuestRange, byte: number): void {
    const { address, size } = guestRange('range', range);
    const word = BigInt(integer('byte', byte, 0, 255)) * 0x0101_0101_0101_0101n;
    this.#assertReach(address, size);
    this.#assertForeign(address, size);
    for (const piece of pieces(address, size, PIECE)) {
      const command = { command: COMMAND.fill, address: piece.at, size: piece.size, args: [word] };
      this.#carryOut(command, 'fill', { address, size });
    }
  }

  /**
   * A 64-bit sum of what the guest reads: h = 0, then for each 8 bytes h = rotate-left(h, 5) + the little-endian word, the last one completed
   * with zeros. Equal content gives equal sums, and nothing is copied.
   */
  checksum(range: GuestRange): bigint {
    const { address, size } = guestRange('range', range);
    this.#assertReach(address, size);
    let sum = 0n;
    // Pieces end at whole words of the range, which need not be aligned.
    for (let done = 0; done < size; done += PIECE) {
      const piece = { address: address + done, size: Math.min(PIECE, size - done) };
      sum = this.#carryOut({ command: COMMAND.checksum, ...piece, args: [sum] }, 'checksum', { address, size });
    }
    return sum;
  }

  /**
   * Atomically replaces a 64-bit word if it is `expected`.
   *
   * @param address A multiple of 8.
   * @returns What was there: `expected`, when it was replaced.
   */
  compareAndSwap(address: number, expected: bigint, replacement: bigint): bigint {
    if (integer('address', address) % 8) throw rangeError(`address must be a multiple of 8, got ${address}`);
    const args = [word('expected', expected), word('replacement', replacement)];
    this.#assertReach(address, 8);
    this.#assertForeign(address, 8);
    const range = { address, size: 8 };
    return this.#carryOut({ command: COMMAND.compareAndSwap, ...range, args }, 'compare and swap', range);
  }

  /** The guest reads one byte of every page, and writes it back if asked to: so the pages exist and are mapped, and keep their content. */
  touch(range: GuestRange, given: TouchOptions = {}): void {
    const { address, size } = guestRange('range', range);
    const { write = false, pageSize = this.#vm.kvm.pageSize } = options('options', given);
    if (!Number.isInteger(Math.log2(integer('pageSize', pageSize, 1, GiB))))
      throw rangeError(`pageSize must be a power of two, got ${pageSize}`);
    this.#assertReach(address, size);
    if (boolean('write', write)) this.#assertForeign(address, size);
    const args = [BigInt(pageSize), write ? 1n : 0n];
    for (const piece of pieces(address, size, Math.min(GiB, TOUCHES * pageSize))) {
      const command = { command: COMMAND.touch, address: piece.at, size: piece.size, args };
      this.#carryOut(command, write ? 'touch' : 'read', { address, size });
    }
  }

  /**
   * The guest makes a hypercall: VMCALL or VMMCALL, whichever this CPU has, with rax, rbx, rcx, rdx, rsi; HVC with x0 … x4 on aarch64. A host
   * without hardware paging may never come back from it.
   *
   * @returns What the guest got: rax or x0, as a signed number.
   */
  hypercall(number: bigint, args: readonly bigint[] = []): bigint {
    const words = [word('number', number), ...Array.from(args, (value, index) => word(`args[${index}]`, value))];
    if (words.length > 5) throw rangeError('a hypercall has at most 4 arguments');
    return BigInt.asIntN(64, this.#carryOut({ command: COMMAND.hypercall, args: words }, `hypercall ${number}`));
  }

  /**
   * Asks the VMM for a conversion, as a guest with private memory does: onExit gets a 'map-gpa-range' exit, converts, and replies. See `conversionBy`.
   *
   * @param range Guest physical addresses, in whole pages of 4 KiB.
   * @returns The VMM's answer: 0n, or a negative errno.
   * @throws KvmError `ENOSYS` nobody answers: there is no onExit, or it said 'stop'
   */
  requestConversion(range: GuestRange, to: Visibility): bigint {
    const { address, size } = guestRange('range', range);
    if (address % GUEST_PAGE || size % GUEST_PAGE)
      throw rangeError(`range must be made of pages of 4 KiB, got ${formatRange(address, size)}`);
    const secret = oneOf('to', to, ['private', 'shared']) === 'private';
    const what = `request to make it ${to}`;
    const args = [KVM_HC_MAP_GPA_RANGE, BigInt(address), BigInt(size / GUEST_PAGE), secret ? ENCRYPTED : 0n];
    const command =
      this.conversionBy === 'hypercall'
        ? { command: COMMAND.hypercall, args }
        : { command: COMMAND.ask, address, size, args: [secret ? 1n : 0n] };
    return BigInt.asIntN(64, this.#carryOut(command, what, { address, size }));
  }

  /**
   * The guest ends: HLT, or PSCI SYSTEM_OFF on aarch64, which is the end of the VM's other vCPUs as well. After it the agent can only be closed.
   *
   * @returns The exit that KVM made of it, 'hlt' or 'system-event'.
   */
  halt(): Exit {
    this.#assertIdle();
    this.#busy = true;
    try {
      this.#send({ command: COMMAND.halt });
      const exit = this.#enter('halt', null);
      if (exit.reason !== 'hlt' && exit.reason !== 'system-event') throw this.#failure(exit, 'halt', null);
      this.#halted = true;
      return exit;
    } finally {
      this.#busy = false;
    }
  }

  /** Closes the vCPU; the agent's memory is the guest's again. A second call does nothing. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    agentsOf.get(this.#vm)?.delete(this);
    this.vcpu.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /** One command, once. @returns the mailbox's result word. */
  #carryOut(command: Command, what: string, range: GuestRange | null = null): bigint {
    this.#assertIdle();
    this.#busy = true;
    try {
      this.#send(command);
      return this.#untilDone(what, range);
    } finally {
      this.#busy = false;
    }
  }

  #send({ command, address = 0, size = 0, args = [] }: Command): void {
    if (!this.#waiting) this.#comeBack();
    const touched = command === COMMAND.ask ? [] : [{ address, size }];
    this.#tables.map({ address: this.address, size: AGENT_SIZE }, ...this.#doorbellPage(), ...touched);
    this.#writeMailbox(command, address, size, args);
    this.#waiting = false;
  }

  #untilDone(what: string, range: GuestRange | null): bigint {
    let resumed = false;
    let isDeaf = false;
    for (;;) {
      const exit = this.#enter(what, range);
      const rung = this.#rung(exit);
      if (rung === DOORBELL.ready) {
        const mailbox = this.#readMailbox();
        if (mailbox.getBigUint64(MAILBOX.command, true) !== 0n) {
          if (isDeaf)
            throw failed('EIO', ERRNO.EIO, what, range, {
              why: 'the guest does not see its mailbox any more: has the host discarded or remapped that memory?',
            });
          isDeaf = true;
          continue;
        }
        this.#waiting = true;
        return mailbox.getBigUint64(MAILBOX.result, true);
      }
      if (rung === DOORBELL.exception) {
        this.#waiting = true;
        this.#tables.forget();
        throw this.#exception(what, range);
      }
      if (rung === DOORBELL.ask) {
        const { request, answer } = this.#request();
        this.#handle(request, what, range, resumed);
        const reply = new BigInt64Array([answer()]);
        this.#vm.memory.write(this.address + MAILBOX.result, new Uint8Array(reply.buffer));
      } else {
        this.#handle(exit, what, range, resumed);
      }
      resumed = true;
    }
  }

  #enter(what: string, range: GuestRange | null): Exit {
    this.#unanswered = false;
    try {
      const exit = this.vcpu.run({ timeout: this.#timeout });
      this.#unanswered = unanswered.includes(exit.reason);
      return exit;
    } catch (error) {
      // KVM gives no address with these two. ENOSYS is arm64's word for an instruction on MMIO that it cannot carry out.
      if (!(error instanceof KvmError) || (error.code !== 'EFAULT' && error.code !== 'ENOSYS')) throw error;
      const why = error.code === 'EFAULT' ? error.message : 'an atomic access, and no memory is there';
      throw failed('EFAULT', ERRNO.EFAULT, what, range, { why, cause: error });
    }
  }

  /** Returns when the guest shall go on. */
  #handle(exit: Exit, what: string, range: GuestRange | null, resumed: boolean): void {
    // The handler has had its chance: the same fault would come for ever.
    if (exit.reason === 'memory-fault' && exit.repeats > 1 && resumed) throw this.#failure(exit, what, range);
    const decision = this.#onExit?.(exit) ?? 'stop';
    if (decision !== 'resume' && decision !== 'stop') throw typeError("onExit must return 'resume' or 'stop'");
    if (decision === 'stop') throw this.#failure(exit, what, range);
    if (this.closed) throw KvmError.closed('the guest agent');
  }

  /** The guest starts again at its first instruction, whatever it was in the middle of, and comes to its doorbell. */
  #comeBack(): void {
    // KVM completes an exit before it looks at the registers: let it, and go no further.
    for (let count = 0; this.#unanswered && count < COMPLETIONS; count++) {
      const { reason } = this.vcpu.run({ timeout: 0 });
      this.#unanswered = reason !== 'timeout' && reason !== 'interrupted';
    }
    this.#tables.forget();
    this.#tables.map({ address: this.address, size: AGENT_SIZE }, ...this.#doorbellPage());
    this.#writeMailbox(COMMAND.none, 0, 0, []);
    enter(this.vcpu, this.address, this.#entry, this.#tables.root);
    this.#untilDone('start', null);
  }

  #writeMailbox(command: number, address: number, size: number, args: readonly bigint[]): void {
    const words = new DataView(new ArrayBuffer(MAILBOX.end));
    const set = (offset: number, value: bigint): void => words.setBigUint64(offset, value, true);
    set(MAILBOX.command, BigInt(command));
    set(MAILBOX.address, BigInt(address));
    set(MAILBOX.size, BigInt(size));
    for (const [index, value] of args.entries()) set(MAILBOX.args + 8 * index, BigInt.asUintN(64, value));
    set(MAILBOX.tables, BigInt(this.#tables.root));
    set(MAILBOX.vmmcall, this.#vmmcall);
    set(MAILBOX.doorbell, BigInt(this.#doorbell));
    set(MAILBOX.share, this.#vm.type === 'protected' ? BigInt(this.#vm.kvm.pageSize) : 0n);
    this.#vm.memory.write(this.address + LAYOUT.mailbox, new Uint8Array(words.buffer));
  }

  #readMailbox(): DataView {
    return new DataView(this.#vm.memory.read(this.address + LAYOUT.mailbox, MAILBOX.end).buffer);
  }

  /** What the doorbell says, if this exit is the doorbell. */
  #rung(exit: Exit): number | null {
    if (exit.reason !== 'io' && exit.reason !== 'mmio') return null;
    const mine =
      exit.reason === 'io'
        ? exit.direction === 'out' && exit.port === PORT
        : exit.isWrite && this.#doorbell !== 0 && exit.address === this.#doorbell;
    if (!mine || exit.data.length !== DOORBELL_SIZE) return null;
    return new DataView(exit.data.buffer, exit.data.byteOffset).getUint32(0, true);
  }

  /** aarch64: where there is no memory now, below 4 GiB, which every VM reaches. */
  #doorbellPage(): GuestRange[] {
    if (this.#vm.kvm.arch !== 'aarch64') return [];
    const { pageSize } = this.#vm.kvm;
    if (this.#doorbell === 0 || this.#vm.memslotAt(this.#doorbell)) {
      let at = 4 * GiB - pageSize;
      for (let slot = this.#vm.memslotAt(at); slot; slot = this.#vm.memslotAt(at)) {
        at = slot.address - pageSize;
        if (at <= 0) throw KvmError.unsupported('the agent needs a page below 4 GiB that no memslot covers');
      }
      this.#doorbell = at;
    }
    return [{ address: this.#doorbell, size: DOORBELL_SIZE }];
  }

  /** A request that came by the doorbell, as the exit that the hypercall would have made. */
  #request(): { request: MapGpaRangeExit; answer: () => bigint } {
    const mailbox = this.#readMailbox();
    // What KVM presets.
    let reply = 0n;
    const request: MapGpaRangeExit = {
      reason: 'map-gpa-range',
      address: Number(mailbox.getBigUint64(MAILBOX.address, true)),
      size: Number(mailbox.getBigUint64(MAILBOX.size, true)),
      to: mailbox.getBigUint64(MAILBOX.args, true) === 1n ? 'private' : 'shared',
      reply: (value) => {
        reply = BigInt.asIntN(64, value);
      },
    };
    return { request, answer: () => reply };
  }

  #exception(what: string, range: GuestRange | null): KvmError {
    const mailbox = this.#readMailbox();
    const [syndrome, address] = [MAILBOX.result, MAILBOX.args].map((at) => mailbox.getBigUint64(at, true));
    return failed('EFAULT', ERRNO.EFAULT, what, range, {
      why: `it took an exception, ESR_EL1 ${hex(syndrome ?? 0n)}, at ${hex(address ?? 0n)}: is that beyond the VM's addresses?`,
      at: Number(address),
    });
  }

  #failure(exit: Exit, what: string, range: GuestRange | null): KvmError {
    switch (exit.reason) {
      case 'memory-fault': {
        const again = exit.repeats > 1 ? ', again after it was handled' : '';
        const why = `memory fault at ${hex(exit.address)}, a ${exit.visibility} access${again}: ${exit.cause}`;
        return failed(exit.code, ERRNO[exit.code as keyof typeof ERRNO] ?? 0, what, range, { why, at: exit.address });
      }
      case 'mmio':
        return failed('EFAULT', ERRNO.EFAULT, what, range, { why: this.#noMemory(exit), at: exit.address });
      case 'map-gpa-range':
        return failed('ENOSYS', ERRNO.ENOSYS, what, range, {
          why: 'nobody answered it: give onExit, and have it return "resume"',
        });
      case 'timeout':
        return failed('ETIMEDOUT', 0, what, range, { why: `the guest did not come back within ${this.#timeout} ms` });
      case 'interrupted':
        return failed('EINTR', ERRNO.EINTR, what, range, { why: 'its vCPU was kicked' });
      case 'shutdown':
        return failed('EIO', ERRNO.EIO, what, range, {
          why: 'it took an exception that nobody handles (triple fault)',
        });
      case 'io':
        return failed('EIO', ERRNO.EIO, what, range, {
          why: `port ${hex(exit.port)} was ${exit.direction === 'in' ? 'read' : 'written'}, which is not the agent's`,
        });
      case 'page-source-failed':
        return failed('EIO', ERRNO.EIO, what, range, {
          why: exit.error.message,
          at: exit.address,
          cause: exit.error,
        });
      default:
        return failed('EIO', ERRNO.EIO, what, range, { why: `the vCPU left with '${exit.reason}'` });
    }
  }

  #noMemory({ address, isWrite }: { readonly address: number; readonly isWrite: boolean }): string {
    const slot = this.#vm.memslotAt(address);
    const at = `${isWrite ? 'MMIO write' : 'MMIO read'} at ${hex(address)}`;
    if (!slot) return `${at}: no memslot is there`;
    return slot.readonly && isWrite
      ? `${at}: slot ${slot.slot} is read-only`
      : `${at}: slot ${slot.slot} has no host memory there`;
  }

  #buffer(address: number): number {
    return this.address + LAYOUT.buffer + (address % BUFFER_SIZE);
  }

  #assertIdle(): void {
    if (this.closed) throw KvmError.closed('the guest agent');
    if (this.#halted)
      throw new KvmError({ code: 'ERR_CLOSED', message: 'the guest agent has halted: boot another one' });
    if (this.#busy)
      throw new KvmError({ code: 'EBUSY', errno: -ERRNO.EBUSY, message: 'the guest agent carries out a command' });
  }

  #assertReach(address: number, size: number): void {
    integer('address', address);
    if (address + size > this.#limit)
      throw rangeError(`the agent reaches addresses below ${hex(this.#limit)}, not ${formatRange(address, size)}`);
  }

  /** Memory of an agent is not for guests to write: it would run what they wrote. */
  #assertForeign(address: number, size: number): void {
    this.#assertIdle();
    const agent = agentAt(this.#vm, address, size);
    if (agent)
      throw new KvmError({
        code: 'EBUSY',
        errno: -ERRNO.EBUSY,
        message: `an agent lives in ${formatRange(agent.address, AGENT_SIZE)}: boot it at another address, or write elsewhere`,
        errorOffset: Math.max(address, agent.address),
      });
  }
}

function failed(
  code: string,
  errno: number,
  what: string,
  range: GuestRange | null,
  { why, at, cause }: { why: string; at?: number; cause?: unknown },
): KvmError {
  const where = range ? ` ${formatRange(range.address, range.size)}` : '';
  return new KvmError({
    code,
    errno: errno === 0 ? 0 : -errno,
    message: `guest agent, ${what}${where}: ${why} (${code})`,
    args: range ? { ...range } : {},
    cause,
    ...(at === undefined ? {} : { errorOffset: at }),
  });
}

/** Parts of a range that end where `size` divides the address. */
function* pieces(address: number, length: number, size: number): Generator<{ at: number; size: number }> {
  for (let at = address; at < address + length; ) {
    const end = Math.min(address + length, at - (at % size) + size);
    yield { at, size: end - at };
    at = end;
  }
}

function word(name: string, value: bigint): bigint {
  if (typeof value !== 'bigint') throw typeError(`${name} must be a bigint`);
  if (value < -(1n << 63n) || value >= 1n << 64n) throw rangeError(`${name} has 64 bits`);
  return BigInt.asUintN(64, value);
}

/**
 * Makes KVM pass the guest's MAP_GPA_RANGE on, where guests run on hardware. One without hardware paging never leaves the guest for it.
 *
 * @see KVM_CAP_EXIT_HYPERCALL
 */
function hypercallsExit(vm: Vm): boolean {
  const { mapGpaRangeExit, preFaultMemory } = vm.capabilities;
  if (!mapGpaRangeExit || !preFaultMemory) return false;
  const { kernel, fd } = vm.backing;
  return (
    kernel.enableCap(fd, { cap: KVM_CAP.EXIT_HYPERCALL, flags: 0, args: [1 << Number(KVM_HC_MAP_GPA_RANGE)] }) >= 0
  );
}

function agentAt(vm: Vm, address: number, size: number): GuestAgent | undefined {
  for (const agent of agentsOf.get(vm) ?? []) {
    if (!agent.closed && agent.address < address + size && address < agent.address + AGENT_SIZE) return agent;
  }
  return undefined;
}

function takenPlace(vm: Vm, address: number): number {
  const { pageSize } = vm.kvm;
  if (integer('address', address) % pageSize)
    throw rangeError(`address must be a multiple of ${pageSize}, got ${address}`);
  const agent = agentAt(vm, address, AGENT_SIZE);
  if (!agent) {
    assertWritable(vm, address);
    return address;
  }
  throw new KvmError({
    code: 'EBUSY',
    errno: -ERRNO.EBUSY,
    message: `an agent lives in ${formatRange(agent.address, AGENT_SIZE)}: choose an address 128 KiB away, or leave it to the library`,
  });
}

/** What the host may write the guest need not be able to. */
function assertWritable(vm: Vm, address: number): void {
  for (let at = address; at < address + AGENT_SIZE; ) {
    const slot = vm.memslotAt(at);
    if (!slot?.readonly) {
      at = slot ? slot.address + slot.size : address + AGENT_SIZE;
      continue;
    }
    throw new KvmError({
      code: 'EFAULT',
      errno: -ERRNO.EFAULT,
      message: `the agent cannot live in ${formatRange(address, AGENT_SIZE)}: slot ${slot.slot} is read-only (EFAULT)`,
      errorOffset: at,
    });
  }
}

/** The first 128 KiB that guest and host share and no agent has. */
function freePlace(vm: Vm): number {
  const slots = [...vm.memslots.values()].filter(isShared).sort((a, b) => a.address - b.address);
  for (const slot of slots) {
    const end = slot.address + slot.size;
    for (let at = slot.address; at + AGENT_SIZE <= end; ) {
      const agent = agentAt(vm, at, AGENT_SIZE);
      const [secret] = vm.attributes.privateRanges({ address: at, size: AGENT_SIZE });
      if (!agent && !secret) return at;
      at = agent ? agent.address + AGENT_SIZE : (secret?.address ?? at) + (secret?.size ?? AGENT_SIZE);
    }
  }
  throw KvmError.unsupported(
    'the agent needs 128 KiB that guest and host share: a memslot that is not read-only, with host memory or a guest_memfd created with `mmap` and `initShared`',
  );
}

function isShared({ slot, readonly, guestMemfd, hostMemory }: Memslot): boolean {
  if (slot >= 0x10000 || readonly) return false;
  if (guestMemfd?.backing.gmemOnly) return guestMemfd.backing.hostAccessible && !hostMemory;
  return hostMemory !== null;
}
