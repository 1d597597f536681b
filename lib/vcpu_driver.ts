import { KvmError } from './errors.ts';
import type { Exit } from './exit.ts';
import { typeError } from './validate.ts';
import type { Vcpu } from './vcpu.ts';
import type { Vm } from './vm.ts';

/** What a module exports that drives a vCPU on the thread that runs it. */
export interface VcpuModule {
  /** Called once, before the first run: sets registers, opens devices. */
  readonly setup?: (vcpu: Vcpu, vm: Vm, data: unknown) => void | Promise<void>;
  /** Called for each exit. `true` when it is dealt with and the guest may go on; anything else leaves it to the worker's owner. */
  readonly onExit?: (exit: Exit, vcpu: Vcpu) => unknown;
}

/** How a vCPU is driven; all of it can be posted to another thread. */
export interface VcpuPlan {
  readonly id: number | undefined;
  readonly module: string | undefined;
  readonly registers: Readonly<Record<string, bigint>>;
  readonly data: unknown;
  readonly timeout: number | undefined;
}

/** What the owner of a vCPU worker has for the guest: input of a port or of MMIO, and the answer to a hypercall. */
export interface Answer {
  readonly data?: Uint8Array;
  readonly reply?: bigint;
}

/** An exit of which nothing is live: it can be posted to another thread. */
export type PlainExit = WithoutReply<Exit>;
type WithoutReply<E> = E extends unknown ? Omit<E, 'reply'> : never;

/** A vCPU, run until an exit that its module leaves to the owner. */
export class VcpuDriver {
  readonly vcpu: Vcpu;
  readonly #module: VcpuModule;
  readonly #run: { readonly timeout?: number };
  #exit: Exit | null = null;

  static async start(vm: Vm, { id, module, registers, data, timeout }: VcpuPlan): Promise<VcpuDriver> {
    const vcpu = vm.createVcpu(id);
    try {
      const exports = module === undefined ? {} : vcpuModule(await import(module), module);
      if (Object.keys(registers).length > 0) vcpu.setRegisters(registers);
      await exports.setup?.(vcpu, vm, data);
      return new VcpuDriver(vcpu, exports, timeout);
    } catch (error) {
      vcpu.close();
      throw error;
    }
  }

  constructor(vcpu: Vcpu, module: VcpuModule, timeout: number | undefined) {
    this.vcpu = vcpu;
    this.#module = module;
    this.#run = timeout === undefined ? {} : { timeout };
  }

  /** @param answer To the exit before this one. */
  next({ data, reply }: Answer): PlainExit {
    const before = this.#exit;
    this.#exit = null;
    if (data && (before?.reason === 'io' || before?.reason === 'mmio'))
      before.data.set(data.subarray(0, before.data.length));
    if (before && reply !== undefined && 'reply' in before) before.reply(reply);
    let exit = this.vcpu.run(this.#run);
    while (this.#module.onExit?.(exit, this.vcpu) === true) exit = this.vcpu.run(this.#run);
    this.#exit = exit;
    const { reply: _, ...plain } = exit as Exit & { reply?: unknown };
    return 'port' in plain || 'isWrite' in plain ? { ...plain, data: plain.data.slice() } : plain;
  }
}

/** A name that is misspelled would leave a guest that nobody drives. */
function vcpuModule(exports: VcpuModule, where: string): VcpuModule {
  const { setup, onExit } = exports;
  if (setup === undefined && onExit === undefined) throw typeError(`${where} exports neither setup nor onExit`);
  if ([setup, onExit].some((each) => each !== undefined && typeof each !== 'function'))
    throw typeError(`${where}: setup and onExit must be functions`);
  return exports;
}

/** An error as it can be posted: a clone of a KvmError would be none any more. */
export interface PlainError {
  readonly kvm: {
    readonly code: string;
    readonly errno: number;
    readonly syscall: string;
    readonly request: string | null;
  } | null;
  readonly message: string;
  readonly stack: string;
}

export function plainError(error: unknown): PlainError {
  const { message, stack = '' } = error instanceof Error ? error : new Error(String(error));
  if (!(error instanceof KvmError)) return { kvm: null, message, stack };
  const { code, errno, syscall, request } = error;
  return { kvm: { code, errno, syscall, request }, message, stack };
}

export function revived({ kvm, message, stack }: PlainError): Error {
  const error = kvm ? new KvmError({ ...kvm, message }) : new Error(message);
  if (stack) error.stack = stack;
  return error;
}
