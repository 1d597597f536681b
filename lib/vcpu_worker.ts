import { setImmediate } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { MessageChannel, receiveMessageOnPort, Worker } from 'node:worker_threads';
import { KvmError } from './errors.ts';
import type { Exit } from './exit.ts';
import { bytes } from './kernel/arguments.ts';
import { sourceFailure } from './pager/source_failure.ts';
import { guardConstructor, internal, Resource } from './resource.ts';
import { integer, options, text, typeError } from './validate.ts';
import { timeoutOf } from './vcpu.ts';
import { type Answer, type PlainError, type PlainExit, revived, VcpuDriver, type VcpuPlan } from './vcpu_driver.ts';
import { Vm, type VmHandle } from './vm.ts';

export interface VcpuWorkerOptions {
  /** The lowest free number when omitted. */
  readonly id?: number;
  /**
   * A module that the vCPU's thread imports, by file URL or absolute path. It may export `setup(vcpu, vm, data)`, called once before the first
   * run, and `onExit(exit, vcpu)`, called for each exit on the vCPU's own thread: what that answers with `true` costs no hand-over between
   * threads, everything else comes here.
   */
  readonly module?: string | URL;
  /** Set before `setup`: for guests that need nothing else. */
  readonly registers?: Readonly<Record<string, bigint>>;
  /** For `setup`: anything that postMessage() can send. */
  readonly data?: unknown;
  /** Milliseconds of each run, as for vcpu.run(). */
  readonly timeout?: number;
}

/** Milliseconds that a thread has to end by itself. */
const GRACE = 1000;

/** A driver on whatever thread. */
interface Link {
  readonly id: number;
  next(answer: Answer): Promise<PlainExit>;
  kick(): void;
  close(): void;
  readonly ended: Promise<void>;
}

/**
 * A vCPU on a worker of its own, whose exits come here: `for await (const exit of worker)`. The guest waits while an exit is looked at, and goes on
 * when the next one is asked for. If the worker dies, its vCPU is gone and the VM is not. On the software kernel, which lives on one thread, the
 * vCPU runs on this one, between other events.
 */
export class VcpuWorker extends Resource {
  /** The vCPU's. */
  readonly id: number;
  /** Settles when the thread is gone, whoever ended it. */
  readonly ended: Promise<void>;
  /** Kept, as everything keeps its owner. */
  readonly #vm: Vm;
  readonly #link: Link;
  readonly #pending: { answer: Answer; busy: boolean } = { answer: {}, busy: false };

  /**
   * Creates the vCPU on its thread and returns when it is set up. No guest code has run by then.
   *
   * @throws KvmError as vm.createVcpu() and vcpu.setRegisters() · what the module throws · TypeError, RangeError for options that cannot be
   */
  static async start(vm: Vm, given: VcpuWorkerOptions = {}): Promise<VcpuWorker> {
    if (!(vm instanceof Vm)) throw typeError('vm must be a Vm');
    const { id, module, registers = {}, data, timeout } = options('options', given);
    if (id !== undefined) integer('id', id, 0, 0x7fffffff);
    if (timeout !== undefined) timeoutOf({ timeout });
    const plan: VcpuPlan = {
      id,
      module: module === undefined ? undefined : moduleUrl(module),
      registers: { ...options('registers', registers) },
      data,
      timeout,
    };
    const handle = handleOf(vm);
    const link = handle ? await startThread(vm, handle, plan) : await startHere(vm, plan);
    if (!vm.closed) return new VcpuWorker(internal, vm, link);
    link.close();
    throw KvmError.closed('the VM');
  }

  /** @internal */
  constructor(token: typeof internal, vm: Vm, link: Link) {
    guardConstructor(token, 'VcpuWorker.start()');
    super(vm, `the worker of vCPU ${link.id}`, () => link.close());
    this.#vm = vm;
    this.#link = link;
    this.id = link.id;
    this.ended = link.ended;
    Object.freeze(this);
  }

  /**
   * Runs the guest until an exit that the module leaves. What was written into the `data` of the exit before, or given to its `reply()`, reaches the
   * guest now.
   *
   * @throws KvmError as vcpu.run() · `EBUSY` an exit is awaited already · `ERR_CLOSED` closed here, or the worker is gone · what the module throws
   */
  async next(): Promise<Exit> {
    this.assertOpen();
    const pending = this.#pending;
    if (pending.busy)
      throw new KvmError({ code: 'EBUSY', message: `the next exit of vCPU ${this.id} is awaited already` });
    this.#vm.assertThawed();
    const { runs } = this.#vm.backing;
    const { answer } = pending;
    pending.answer = {};
    pending.busy = true;
    runs.count++;
    try {
      // A copy: whoever had the bytes may have transferred them.
      const exit = await this.#link.next(
        answer.data ? { ...answer, data: bytes('data', answer.data).slice() } : answer,
      );
      const failed = exit.reason === 'mmio' ? sourceFailure(this.#vm, exit.address) : null;
      if (failed) return failed;
      const next: { data?: Uint8Array; reply?: bigint } = {};
      pending.answer = next;
      if (exit.reason === 'io' || exit.reason === 'mmio') next.data = exit.data;
      if (exit.reason !== 'hypercall' && exit.reason !== 'map-gpa-range') return exit as Exit;
      return {
        ...exit,
        reply(value: bigint): void {
          if (typeof value !== 'bigint') throw typeError('value must be a bigint');
          next.reply = value;
        },
      };
    } catch (error) {
      // A vCPU on another thread knows nothing of this thread's pagers.
      const failed = error instanceof KvmError && error.code === 'EFAULT' ? sourceFailure(this.#vm) : null;
      if (failed) return failed;
      throw error;
    } finally {
      runs.count--;
      pending.busy = false;
    }
  }

  /** The exits, one after the other; leaving the loop closes nothing. It ends when the worker is closed. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Exit, void, void> {
    while (!this.closed) {
      try {
        yield await this.next();
      } catch (error) {
        if (this.closed && error instanceof KvmError && error.code === 'ERR_CLOSED') return;
        throw error;
      }
    }
  }

  /** The run in progress, or else the next one, ends with 'interrupted'. */
  kick(): void {
    this.assertOpen();
    if (!this.#vm.closed) this.#link.kick();
  }
}

/** @internal */
export function moduleUrl(module: string | URL): string {
  if (module instanceof URL) return module.href;
  return text('module', module).startsWith('file:') ? module : pathToFileURL(module).href;
}

/** Null where a VM cannot leave its thread. */
function handleOf(vm: Vm): VmHandle | null {
  try {
    return vm.handle;
  } catch (error) {
    if (error instanceof KvmError && error.code === 'UNSUPPORTED') return null;
    throw error;
  }
}

async function startHere(vm: Vm, plan: VcpuPlan): Promise<Link> {
  const driver = await VcpuDriver.start(vm, plan);
  const { vcpu } = driver;
  return {
    id: vcpu.id,
    ended: Promise.resolve(),
    kick: () => vcpu.kick(),
    close: () => vcpu.close(),
    async next(answer) {
      await setImmediate();
      if (vcpu.closed) throw KvmError.closed(`vCPU ${vcpu.id}`);
      return driver.next(answer);
    },
  };
}

interface FromThread {
  readonly exit?: PlainExit;
  readonly error?: PlainError;
  readonly id?: number;
  readonly fd?: number;
}

async function startThread(vm: Vm, handle: VmHandle, plan: VcpuPlan): Promise<Link> {
  const { kernel } = vm.backing;
  // Not the thread's own port, which is the module's.
  const { port1: port, port2 } = new MessageChannel();
  const worker = new Worker(new URL('./vcpu_worker_thread.js', import.meta.url), {
    workerData: { handle, plan, port: port2 },
    transferList: [port2],
  });
  let settle: { resolve(message: FromThread): void; reject(error: unknown): void } | null = null;
  let gone: unknown = null;
  const message = (): Promise<FromThread> =>
    gone ? Promise.reject(gone) : new Promise((resolve, reject) => (settle = { resolve, reject }));
  const receive = ({ error, ...received }: FromThread): void => {
    if (error) settle?.reject(revived(error));
    else settle?.resolve(received);
  };
  port.on('message', receive);
  const ended = new Promise<void>((resolve) => {
    worker.on('exit', (code) => {
      // Its last words may not have been heard yet.
      for (let last = receiveMessageOnPort(port); last; last = receiveMessageOnPort(port)) receive(last.message);
      gone ??= KvmError.closed(`the worker of the vCPU ended (exit code ${code}): it`);
      settle?.reject(gone);
      port.close();
      resolve();
    });
  });
  worker.on('error', (error) => {
    gone = error;
    settle?.reject(error);
  });
  const { id = 0, fd = -1 } = await message().catch(async (error) => {
    await worker.terminate();
    throw error;
  });
  return {
    id,
    ended,
    kick: () => void (gone ?? kernel.kick(fd)),
    async next(answer) {
      if (gone) throw gone;
      port.postMessage(answer);
      return (await message()).exit as PlainExit;
    },
    close() {
      if (gone) return;
      gone = KvmError.closed(`the worker of vCPU ${id}`);
      settle?.reject(gone);
      port.postMessage(null);
      kernel.kick(fd);
      const timer = setTimeout(() => void worker.terminate(), GRACE).unref();
      ended.finally(() => clearTimeout(timer));
    },
  };
}
