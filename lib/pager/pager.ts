import { setImmediate } from 'node:timers/promises';
import { MessageChannel, type MessagePort, receiveMessageOnPort, Worker } from 'node:worker_threads';
import { KvmError, systemError } from '../errors.ts';
import { formatRange } from '../format.ts';
import type { FileRange } from '../guest_range.ts';
import { HostMemory } from '../host_memory.ts';
import type { Kernel } from '../kernel/kernel.ts';
import { RangeMap } from '../ranges.ts';
import { guardConstructor, internal, Resource } from '../resource.ts';
import {
  ERRNO,
  MiB,
  O_CLOEXEC,
  O_NONBLOCK,
  UFFD_FEATURE_MISSING_SHMEM,
  UFFDIO_REGISTER_MODE_MISSING,
} from '../uapi.ts';
import { boolean, fileRange, integer, options, rangeError, typeError } from '../validate.ts';
import { revived } from '../vcpu_driver.ts';
import { moduleUrl } from '../vcpu_worker.ts';
import { PageFiller } from './page_filler.ts';
import type { FromThread, Shares, ThreadPlan, ToThread } from './pager_thread.ts';
import { type PageContent, STOP } from './source.ts';

export interface PagerOptions {
  /**
   * A module that the pager's thread imports, by file URL or absolute path. It exports `onMissing(range)`, which returns the bytes, and may export
   * `setup(data)`: see PageSourceModule.
   */
  readonly module: string | URL;
  /** For `setup`: anything that postMessage() can send. */
  readonly data?: unknown;
  /** What is missing, in whole pages; the whole memory when omitted. What it holds there is given back first. */
  readonly missing?: readonly FileRange[];
  /** Whether to fetch what nobody has asked for yet. Default true. */
  readonly prefetch?: boolean;
  /** Bytes of a fetch that nobody waits for; 256 KiB unless given. An access that comes meanwhile waits for it. */
  readonly chunkSize?: number;
  readonly onProgress?: (progress: PagerProgress) => void;
}

export interface PagerProgress {
  /** Bytes that were missing at the start. */
  readonly totalBytes: number;
  /** Of these, bytes that have come, as far as the pager's thread has told. */
  readonly presentBytes: number;
  /** Pages that an access had to wait for. */
  readonly faults: number;
}

const CHUNK = MiB / 4;
/** Milliseconds that a thread has to end by itself. */
const GRACE = 1000;

/** What the source's failure was, and where. */
export interface SourceFailure {
  readonly error: KvmError;
  /** Bytes of the memory. */
  readonly range: FileRange;
}

/**
 * Brings the pages of a host memory when somebody touches them, and the others in the background. To a guest, its devices and the host the
 * memory is all there from the start; an access to a page that has not come waits for it: of a vCPU, of `vm.memory`, of a system call. What
 * has the pages runs on a thread of its own, so that this thread may be the one that waits.
 *
 * There are no views of the memory until all of it has come: they could not wait everywhere. If the source fails, what has not come is gone
 * for good: a vCPU that touches it leaves with 'page-source-failed', everything else finds `EFAULT`. A source that neither answers nor fails keeps who
 * waits: close the pager before the VM then.
 *
 * @see userfaultfd(2), UFFDIO_COPY; memory shared with other processes since Linux 4.11
 */
export class Pager extends Resource {
  readonly memory: HostMemory;
  /**
   * Settles when all has come, or it is clear that not all will: KvmError `EIO` the source failed (`cause` says how, `errorOffset` where) · `ERR_CLOSED` the
   * pager was closed before.
   */
  readonly done: Promise<void>;
  readonly #link: Link;

  /**
   * Resolves when the source is set up; what is missing is missing from then on.
   *
   * @throws KvmError `UNSUPPORTED` a kind of memory whose pages cannot be waited for, or no permission for userfaultfd · `EBUSY` the memory has a
   *   pager · `ERR_CLOSED` · what the module throws · TypeError, RangeError for options that cannot be
   */
  static async start(memory: HostMemory, given: PagerOptions): Promise<Pager> {
    if (!HostMemory.is(memory)) throw typeError('memory must be a HostMemory');
    const { module, data, missing, prefetch = true, chunkSize = CHUNK, onProgress } = options('options', given);
    if (onProgress !== undefined && typeof onProgress !== 'function') throw typeError('onProgress must be a function');
    const { pageSize } = memory.backing.kvm;
    const plan: Omit<ThreadPlan, 'port' | 'posted'> = {
      module: moduleUrl(module),
      data,
      missing: missingRanges(memory, missing),
      chunkSize: integer('options.chunkSize', chunkSize, pageSize),
      prefetch: boolean('options.prefetch', prefetch),
    };
    if (chunkSize % pageSize) throw rangeError(`chunkSize must be made of whole pages of ${pageSize} bytes`);
    memory.backing.assertOpen();
    const { kernel } = memory.backing.kvm.backing;
    assertPageable(memory);
    const link = new Link(kernel, memory, plan, onProgress ?? null);
    try {
      await link.started;
      return new Pager(internal, memory, link);
    } catch (error) {
      link.close();
      throw error;
    }
  }

  /** @internal */
  constructor(token: typeof internal, memory: HostMemory, link: Link) {
    guardConstructor(token, 'Pager.start()');
    super(memory, 'the pager', () => link.close());
    this.memory = memory;
    this.#link = link;
    this.done = link.done;
    Object.freeze(this);
  }

  get progress(): PagerProgress {
    return this.#link.progress;
  }
}

function assertPageable(memory: HostMemory): void {
  const { kind, backing } = memory;
  if (kind !== 'memfd' && kind !== 'anonymous')
    throw KvmError.unsupported(`nobody can wait for a page of ${kind} memory: use 'memfd' or 'anonymous'`);
  if (backing.paging())
    throw new KvmError({ code: 'EBUSY', errno: -ERRNO.EBUSY, message: 'the memory has a pager already (EBUSY)' });
}

function missingRanges(memory: HostMemory, missing: readonly FileRange[] | undefined): FileRange[] {
  const { pageSize } = memory.backing.kvm;
  if (missing === undefined) return [{ offset: 0, size: memory.size }];
  if (!Array.isArray(missing)) throw typeError('options.missing must be an array of ranges');
  const ranges = new RangeMap<true>();
  for (const each of missing) {
    const { offset, size } = fileRange('options.missing', options('options.missing', each), memory.size);
    if (offset % pageSize || size % pageSize)
      throw rangeError(`options.missing must be made of whole pages of ${pageSize} bytes`);
    ranges.set(offset, offset + size, true);
  }
  return Array.from(ranges, ({ start, end }) => ({ offset: start, size: end - start }));
}

/** The thread of a source, and what fills the memory: that thread, or this one where a kernel lives on one. */
class Link {
  readonly started: Promise<void>;
  readonly done: Promise<void>;
  readonly #kernel: Kernel;
  readonly #memory: HostMemory;
  readonly #onProgress: ((progress: PagerProgress) => void) | null;
  readonly #totalBytes: number;
  readonly #plan: Omit<ThreadPlan, 'port' | 'posted'>;
  readonly #uffd: number;
  /** The number by which the thread takes it. */
  readonly #share: number;
  readonly #filler: PageFiller;
  readonly #port: MessagePort;
  readonly #posted = new Int32Array(new SharedArrayBuffer(8));
  readonly #worker: Worker;
  readonly #pending = new Map<number, (answer: FromThread) => void>();
  readonly #settle: { start(): void; done(): void; fail(error: unknown): void };
  #leftBytes: number;
  #faults = 0;
  #lastId = 0;
  #over = false;
  /** This thread fills, because the kernel lives on it. */
  readonly #here: boolean;
  /** From now on pages are missing. */
  #begun = false;
  /** The thread has ended. */
  #gone = false;
  /** It has seen to those who wait for what will not come. */
  #accounted = false;
  #failure: SourceFailure | null = null;

  constructor(
    kernel: Kernel,
    memory: HostMemory,
    plan: Omit<ThreadPlan, 'port' | 'posted'>,
    onProgress: ((progress: PagerProgress) => void) | null,
  ) {
    this.#kernel = kernel;
    this.#memory = memory;
    this.#onProgress = onProgress;
    this.#uffd = openUserfault(kernel);
    this.#filler = new PageFiller(kernel, this.#uffd, memory.backing.mapping, plan.missing);
    this.#totalBytes = this.#leftBytes = this.#filler.leftBytes;
    const [startPromise, start, failStart] = promise();
    const [donePromise, done, failDone] = promise();
    this.started = startPromise;
    this.done = donePromise;
    // Who does not look at it shall not be ended by it.
    donePromise.catch(() => {});
    startPromise.catch(() => {});
    this.#settle = {
      start,
      done,
      fail: (error) => {
        failStart(error);
        failDone(error);
      },
    };
    memory.backing.setPaging({ failure: () => this.failure() });
    const { port1, port2 } = new MessageChannel();
    const workerData: ThreadPlan = { ...plan, port: port2, posted: this.#posted };
    this.#port = port1;
    this.#plan = plan;
    this.#share = kernel.shareFile(this.#uffd);
    this.#here = this.#share === -ERRNO.EOPNOTSUPP;
    try {
      this.#worker = new Worker(new URL('./pager_thread.js', import.meta.url), { workerData, transferList: [port2] });
    } catch (error) {
      // `data` that cannot be posted.
      memory.backing.setPaging(null);
      kernel.close(this.#uffd);
      port1.close();
      throw error;
    }
    this.#port.on('message', (message: FromThread) => this.#hear(message));
    this.#worker.on('error', (error) => this.#fail(error));
    this.#worker.on('exit', () => this.#threadEnded());
  }

  get progress(): PagerProgress {
    if (!this.#over) this.#drain();
    return this.#heard;
  }

  get #heard(): PagerProgress {
    return {
      totalBytes: this.#totalBytes,
      presentBytes: this.#totalBytes - this.#leftBytes,
      faults: this.#faults,
    };
  }

  /** What the source's thread has said by now, also where this thread has had no time to listen. */
  failure(): SourceFailure | null {
    if (!this.#over) this.#drain();
    return this.#failure;
  }

  close(): void {
    if (!this.#over) this.#drain();
    if (!this.#over) this.#fail(KvmError.closed('the pager'));
    // Where another thread fills, it knows what has not come, and takes it away.
    Atomics.store(this.#posted, STOP, 1);
    this.#port.postMessage('stop');
    if (this.#gone) return;
    const timer = setTimeout(() => void this.#worker.terminate(), GRACE).unref();
    this.#worker.once('exit', () => clearTimeout(timer));
  }

  #drain(): void {
    for (let next = receiveMessageOnPort(this.#port); next; next = receiveMessageOnPort(this.#port))
      this.#hear(next.message as FromThread);
  }

  #hear(message: FromThread): void {
    const { ready, done, error, range, progress, id, accounted } = message;
    if (id !== undefined) {
      this.#pending.get(id)?.(message);
      this.#pending.delete(id);
      return;
    }
    if (ready) this.#begin();
    if (progress) this.#advance(progress.leftBytes, progress.faults);
    if (error || done || accounted) this.#accounted = true;
    if (error) this.#fail(revived(error), range);
    if (done) this.#end(null);
  }

  /** The source is set up: what is missing is taken away, and whoever fills begins. */
  #begin(): void {
    const [kernel, uffd] = [this.#kernel, this.#uffd];
    const { mapping, advice } = this.#memory.backing;
    const { missing, prefetch, chunkSize } = this.#plan;
    if (this.#over) return;
    try {
      this.#memory.backing.assertOpen();
      check(kernel, kernel.releaseWindows(mapping), 'munmap');
      let shares: Shares = null;
      if (this.#here) kernel.serveFaults(uffd, () => this.#serve());
      else shares = { uffd: this.#share, mapping: check(kernel, kernel.shareMapping(mapping), 'share') };
      this.#begun = true;
      for (const { offset, size } of missing) {
        // In this order, so that no touch comes between with a page of its own.
        const mode = UFFDIO_REGISTER_MODE_MISSING;
        check(kernel, kernel.uffdioRegister(uffd, mapping, offset, size, mode), 'UFFDIO_REGISTER');
        check(kernel, kernel.madvise(mapping, offset, size, advice), 'madvise');
      }
      this.#port.postMessage(shares);
      this.#settle.start();
      if (this.#here && prefetch) void this.#prefetch(chunkSize);
    } catch (error) {
      this.#fail(error);
    }
  }

  #threadEnded(): void {
    this.#gone = true;
    this.#drain();
    this.#fail(new Error('the thread of the page source ended'));
    if (!this.#here) {
      // It may not have come to say what is missing: then nothing of it can be believed.
      if (this.#begun && !this.#accounted && !this.#memory.closed) this.#filler.fail();
      this.#kernel.close(this.#uffd);
    }
    this.#port.close();
  }

  #advance(leftBytes: number, faults: number): void {
    this.#leftBytes = leftBytes;
    this.#faults = faults;
    try {
      this.#onProgress?.(this.#heard);
    } catch (error) {
      // A listener's error is its own.
      queueMicrotask(() => {
        throw error;
      });
    }
  }

  #fail(cause: unknown, range: FileRange = this.#filler.next(this.#kernel.pageSize) ?? { offset: 0, size: 0 }): void {
    if (this.#over) return;
    const closed = cause instanceof KvmError && cause.code === 'ERR_CLOSED';
    const why = cause instanceof Error ? cause.message : String(cause);
    const error = closed
      ? cause
      : new KvmError({
          code: 'EIO',
          errno: -ERRNO.EIO,
          message: `the source of pages failed at bytes ${formatRange(range.offset, range.size)} of the memory: ${why} (EIO)`,
          errorOffset: range.offset,
          cause,
        });
    this.#failure = { error, range };
    this.#end(error);
  }

  #end(error: KvmError | null): void {
    if (this.#over) return;
    this.#over = true;
    if (error) {
      if (this.#here && this.#begun) this.#filler.fail();
      this.#settle.fail(error);
    } else {
      this.#leftBytes = 0;
      this.#settle.done();
    }
    for (const [id, resolve] of this.#pending)
      resolve({ id, error: { kvm: null, message: 'the pager ended', stack: '' } });
    // Before it began, nothing has been missing.
    if (!this.#failure || !this.#begun) this.#memory.backing.setPaging(null);
    if (!this.#here) return;
    this.#kernel.close(this.#uffd);
    this.#port.postMessage('stop');
  }

  // ── where this thread fills

  /** Runs inside the access that waits. */
  #serve(): void {
    for (const range of this.#filler.waiting(0)) {
      if (this.#over) return;
      this.#faults++;
      this.#take(range, this.#askNow(range));
    }
  }

  async #prefetch(chunkSize: number): Promise<void> {
    for (let range = this.#filler.next(chunkSize); range && !this.#over; range = this.#filler.next(chunkSize)) {
      const wanted = range;
      const answer = await new Promise<FromThread>((resolve) => this.#post(wanted, resolve));
      if (!this.#over) this.#take(range, answer);
      await setImmediate();
    }
  }

  #take(range: FileRange, { error, content = null }: FromThread): void {
    try {
      if (error) throw revived(error);
      this.#filler.fill(range, content as PageContent);
    } catch (cause) {
      this.#fail(cause, range);
      return;
    }
    const left = this.#filler.leftBytes;
    if (left < this.#leftBytes) this.#advance(left, this.#faults);
    if (left === 0) this.#end(null);
  }

  #askNow(range: FileRange): FromThread {
    let answer: FromThread | null = null;
    this.#post(range, (got) => {
      answer = got;
    });
    while (!answer) {
      const before = Atomics.load(this.#posted, 0);
      this.#drain();
      if (this.#over) return answer ?? { error: { kvm: null, message: 'the pager ended', stack: '' } };
      if (!answer) Atomics.wait(this.#posted, 0, before);
    }
    return answer;
  }

  #post(range: FileRange, resolve: (answer: FromThread) => void): void {
    const id = ++this.#lastId;
    this.#pending.set(id, resolve);
    this.#port.postMessage({ id, range } satisfies ToThread);
  }
}

function promise(): [Promise<void>, () => void, (error: unknown) => void] {
  let [resolve, reject] = [() => {}, (_: unknown) => {}];
  const made = new Promise<void>((yes, no) => {
    [resolve, reject] = [yes, no];
  });
  return [made, () => resolve(), (error) => reject(error)];
}

function openUserfault(kernel: Kernel): number {
  const uffd = kernel.userfaultfd(O_CLOEXEC | O_NONBLOCK);
  if (uffd === -ERRNO.EPERM || uffd === -ERRNO.ENOSYS)
    throw KvmError.unsupported(
      'waiting for pages needs userfaultfd(2) that also works for accesses by the kernel, as KVM’s are: CAP_SYS_PTRACE, or sysctl vm.unprivileged_userfaultfd=1',
    );
  check(kernel, uffd, 'userfaultfd');
  const api = kernel.uffdioApi(uffd, UFFD_FEATURE_MISSING_SHMEM);
  if (api >= 0) return uffd;
  kernel.close(uffd);
  throw KvmError.unsupported(
    'this kernel’s userfaultfd does not know shared memory (UFFD_FEATURE_MISSING_SHMEM, Linux 4.11)',
  );
}

function check(kernel: Kernel, result: number, syscall: string): number {
  if (result < 0) throw systemError(result, { syscall }, kernel.explain());
  return result;
}
