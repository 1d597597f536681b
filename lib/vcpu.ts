import { KvmError, systemError } from './errors.ts';
import { type Exit, ExitDecoder } from './exit.ts';
import type { GuestRange, Visibility } from './guest_range.ts';
import { paged } from './host_memory.ts';
import type { Kernel, Result } from './kernel/kernel.ts';
import { sourceFailure } from './pager/source_failure.ts';
import { type RegisterFile, registerFile } from './registers.ts';
import { closing, guardConstructor, type internal, Resource } from './resource.ts';
import { readStatistics, type Statistics } from './statistics.ts';
import { ERRNO, errnoName, KVM_EXIT } from './uapi.ts';
import { abortSignal, guestRange, options, rangeError, typeError } from './validate.ts';
import type { Vm } from './vm.ts';

export interface RunOptions {
  /** Milliseconds after which the run ends with 'timeout', never earlier; 10 000 unless given. Some guests would never come back. */
  readonly timeout?: number;
}

const DEFAULT_TIMEOUT = 10_000;
const MAX_TIMEOUT = 2 ** 31 - 1;

/** @internal */
export function timeoutOf(given: RunOptions | undefined): number {
  const { timeout = DEFAULT_TIMEOUT } = given === undefined ? {} : options('options', given);
  if (typeof timeout !== 'number') throw typeError('timeout must be a number');
  if (!(timeout >= 0 && timeout <= MAX_TIMEOUT))
    throw rangeError(`timeout must be 0 to ${MAX_TIMEOUT} milliseconds, got ${timeout}`);
  return timeout;
}

/**
 * A virtual CPU. It stays on the thread that runs it: for more than one, give each a worker.
 *
 * @see KVM_CREATE_VCPU
 */
export class Vcpu extends Resource {
  readonly id: number;
  readonly #kernel: Kernel;
  readonly #vm: Vm;
  readonly #fd: number;
  readonly #decoder: ExitDecoder;
  readonly #registers: RegisterFile;
  /** The last memory fault, to notice one that repeats. */
  #fault: { readonly key: string; count: number } | null = null;

  /** @internal */
  constructor(token: typeof internal, vm: Vm, kernel: Kernel, fd: number, id: number) {
    guardConstructor(token, 'vm.createVcpu()');
    super(vm, `vCPU ${id} (fd ${fd})`, closing(kernel, fd));
    this.id = id;
    this.#kernel = kernel;
    this.#vm = vm;
    this.#fd = fd;
    this.#decoder = new ExitDecoder(kernel.runPage(fd));
    this.#registers = registerFile(kernel, fd, (result, request) => this.#check(result, request));
    Object.freeze(this);
  }

  /**
   * Runs the guest on this thread, which does nothing else meanwhile, until the guest needs the host.
   *
   * @returns The exit. The objects of port I/O and MMIO are used again by the next run.
   * @throws KvmError `EFAULT` the guest touched host memory that is not mapped, and the kernel says no more · `EBUSY` it runs already ·
   *   `UNSUPPORTED` guest code that the software kernel cannot carry out · `ERR_CLOSED`
   * @see KVM_RUN
   */
  run(given?: RunOptions): Exit {
    const timeout = timeoutOf(given);
    this.assertOpen();
    this.#vm.assertThawed();
    return this.#exit(this.#kernel.run(this.#fd, timeout));
  }

  /**
   * The same on a thread of the vCPU's own. An exit costs a hand-over between threads: good for scripts, not for devices.
   *
   * @throws as run() · the signal's reason
   */
  async runAsync(given?: RunOptions & { readonly signal?: AbortSignal }): Promise<Exit> {
    const { signal } = given === undefined ? {} : options('options', given);
    if (signal !== undefined) abortSignal('signal', signal);
    const timeout = timeoutOf(given);
    signal?.throwIfAborted();
    this.assertOpen();
    this.#vm.assertThawed();
    const { runs } = this.#vm.backing;
    const kick = (): void => void this.#kernel.kick(this.#fd);
    signal?.addEventListener('abort', kick, { once: true });
    runs.count++;
    try {
      const result = await this.#kernel.runAsync(this.#fd, timeout);
      signal?.throwIfAborted();
      this.assertOpen();
      return this.#exit(result);
    } finally {
      runs.count--;
      signal?.removeEventListener('abort', kick);
    }
  }

  /** From any thread: the run in progress, or else the next one, ends with 'interrupted'. */
  kick(): void {
    this.assertOpen();
    this.#check(this.#kernel.kick(this.#fd), 'kick');
  }

  /**
   * Maps guest memory before the guest touches it. A part that cannot be is left: call again with `remaining`, until its size is 0.
   *
   * @param range Guest physical addresses, page-aligned.
   * @throws KvmError `EOPNOTSUPP` without hardware paging, `ENOSPC` before the first memslot · `ENOENT` no memslot at its start · `EFAULT` no
   *   page can be there · `EINVAL` unaligned, or a kernel without the call · `EINTR` a kick, which also ends the next run, or a signal ·
   *   `EAGAIN` a memslot is changing; before Linux 6.18 also: one has moved or gone since the vCPU last ran, nothing can be mapped until it
   *   runs again, and it takes a second to say so · `EBUSY` it runs · `ERR_CLOSED`
   * @see KVM_PRE_FAULT_MEMORY, Linux 6.11, x86_64
   */
  preFaultMemory(range: GuestRange): { readonly remaining: GuestRange } {
    const { address, size } = guestRange('range', range);
    this.assertOpen();
    const args = { gpa: BigInt(address), size: BigInt(size), flags: 0 };
    this.#check(this.#kernel.preFaultMemory(this.#fd, args), 'KVM_PRE_FAULT_MEMORY');
    return { remaining: { address: Number(args.gpa), size: Number(args.size) } };
  }

  /**
   * x86_64: 'rax' … 'r15', 'rip', 'rflags', 'cr0' …, 'efer', 'cs.base' …; aarch64: 'x0' … 'x30', 'sp', 'pc', 'pstate', and the system registers
   * that set up EL1 ('sctlr_el1' …).
   *
   * @see KVM_GET_REGS, KVM_GET_SREGS; KVM_GET_ONE_REG
   */
  getRegisters(): Record<string, bigint> {
    this.assertOpen();
    return this.#registers.get();
  }

  /** Sets the registers named; the others stay. */
  setRegisters(registers: Readonly<Record<string, bigint>>): void {
    const read = { ...options('registers', registers) };
    this.assertOpen();
    this.#registers.set(read);
  }

  /**
   * What the kernel counted for this vCPU: 'exits', on x86_64 'pf_taken', the faults of the second stage … The software kernel counts a few of them,
   * and 'pf_taken' on aarch64 too, where Linux does not.
   *
   * @throws KvmError `UNSUPPORTED` a kernel before 5.14 · `EBUSY` it runs · `ERR_CLOSED`
   * @see KVM_GET_STATS_FD
   */
  statistics(): Statistics {
    this.assertOpen();
    return readStatistics(this.#kernel, this.#fd);
  }

  /** @internal */
  get handle() {
    return { kernel: this.#kernel, fd: this.#fd, vm: this.#vm };
  }

  #exit(result: Result): Exit {
    if (result >= 0) {
      this.#fault = null;
      const exit = this.#decoder.decode();
      return paged.count > 0 && exit.reason === 'mmio' ? (sourceFailure(this.#vm, exit.address) ?? exit) : exit;
    }
    const failed = paged.count > 0 && result === -ERRNO.EFAULT && sourceFailure(this.#vm);
    if (failed) return failed;
    if (result === -ERRNO.EINTR) return { reason: this.#kernel.deadlinePassed(this.#fd) ? 'timeout' : 'interrupted' };
    // Only an errno of a fault makes the reason in kvm_run believable: it may be left over. Contract §13.1.
    const faults: readonly number[] = [-ERRNO.EFAULT, -ERRNO.EHWPOISON, -ERRNO.ENOMEM];
    if (faults.includes(result) && this.#decoder.reason === KVM_EXIT.MEMORY_FAULT) return this.#memoryFault(result);
    if (result === -ERRNO.EOPNOTSUPP) throw KvmError.unsupported(this.#kernel.explain() ?? 'unknown guest code');
    if (result === -ERRNO.EBADF) throw KvmError.closed(`the VM of vCPU ${this.id}, by the thread that created it,`);
    throw this.#error(
      result,
      'KVM_RUN',
      result === -ERRNO.EFAULT
        ? 'the guest touched memory of a slot whose host memory is not there'
        : this.#kernel.explain(),
    );
  }

  #memoryFault(result: Result): Exit {
    const { address, size, visibility } = this.#decoder.memoryFault();
    const cause = this.#cause(address, visibility, result);
    const key = `${address} ${visibility} ${cause}`;
    this.#fault = this.#fault?.key === key ? { key, count: this.#fault.count + 1 } : { key, count: 1 };
    return {
      reason: 'memory-fault',
      address,
      size,
      visibility,
      cause,
      code: errnoName(result),
      repeats: this.#fault.count,
    };
  }

  #cause(address: number, visibility: Visibility, result: Result): string {
    if (result === -ERRNO.EHWPOISON) return 'the page is poisoned';
    if (result === -ERRNO.ENOMEM) return 'no memory is left for the page';
    const slot = this.#vm.memslotAt(address);
    if (!slot) return 'no memslot is there';
    if (!slot.guestMemfd) return `slot ${slot.slot} has no guest_memfd`;
    if (slot.guestMemfd.closed) return `the guest_memfd of slot ${slot.slot} is closed`;
    const known = this.#vm.attributes.at(address);
    if (known !== visibility) return `the guest wants it ${visibility}, and it is ${known}`;
    return `slot ${slot.slot} could not give the page`;
  }

  #check(result: Result, request: string): number {
    if (result < 0) throw this.#error(result, request, this.#kernel.explain());
    return result;
  }

  #error(result: Result, request: string, reason: string | null): KvmError {
    return systemError(result, { syscall: 'ioctl', request, args: { vcpu: this.id } }, reason);
  }
}
