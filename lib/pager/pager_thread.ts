import { setImmediate } from 'node:timers/promises';
import { type MessagePort, workerData } from 'node:worker_threads';
import type { FileRange } from '../guest_range.ts';
import { linuxKernel } from '../kernel/linux/linux_kernel.ts';
import { type PlainError, plainError } from '../vcpu_driver.ts';
import { PageFiller } from './page_filler.ts';
import { type Ask, openSource, type PageContent, STOP } from './source.ts';

export interface ThreadPlan {
  readonly module: string;
  readonly data: unknown;
  readonly port: MessagePort;
  /** Counts what was posted, for who waits without an event loop; and behind it whether to stop, for who fills without one. */
  readonly posted: Int32Array;
  readonly missing: readonly FileRange[];
  readonly chunkSize: number;
  readonly prefetch: boolean;
}

/** What to fill; null where another thread fills, and only asks here. */
export type Shares = { readonly uffd: number; readonly mapping: number } | null;

/** What the thread says. */
export interface FromThread {
  readonly ready?: true;
  readonly done?: true;
  /** Nobody waits any more, as was asked for. */
  readonly accounted?: true;
  readonly error?: PlainError;
  /** Of a failure: what the source was asked for. */
  readonly range?: FileRange;
  readonly progress?: { readonly leftBytes: number; readonly faults: number };
  /** The answer to a question, by its number. */
  readonly id?: number;
  readonly content?: PageContent;
}

/** A question from the thread that fills. */
export interface ToThread {
  readonly id: number;
  readonly range: FileRange;
}

/** How long a look for faults takes when there is nothing else to do: milliseconds. */
const LOOK = 20;
const { module, data, port, posted, missing, chunkSize, prefetch } = workerData as ThreadPlan;

function post(message: FromThread): void {
  port.postMessage(message);
  Atomics.add(posted, 0, 1);
  Atomics.notify(posted, 0);
}

/** Fills until all is there. Whatever ends it before that leaves nobody waiting. */
async function fillAll(ask: Ask, { uffd, mapping }: NonNullable<Shares>): Promise<void> {
  const kernel = linuxKernel();
  const fd = kernel.takeFile(uffd, 'uffd');
  const filler = new PageFiller(kernel, fd, kernel.takeMapping(mapping), missing);
  let asked: FileRange | undefined;
  let faults = 0;
  let ended = false;
  const fail = (error: unknown): void => {
    if (ended) return;
    ended = true;
    post({ error: plainError(error), ...(asked && { range: asked }) });
    filler.fail();
  };
  // The module may end the thread.
  process.once('exit', () => fail(new Error('the thread of the page source ended')));
  const stop = (): never => {
    if (!ended) filler.fail();
    ended = true;
    post({ accounted: true });
    return process.exit();
  };
  port.once('message', stop);
  try {
    for (let left = filler.leftBytes; left > 0; left = filler.leftBytes) {
      const early = prefetch ? filler.next(chunkSize) : null;
      const waiting = filler.waiting(early ? 0 : LOOK);
      faults += waiting.length;
      for (const range of waiting.length > 0 || !early ? waiting : [early]) {
        asked = range;
        const content = await ask(range);
        if (Atomics.load(posted, STOP) === 1) stop();
        filler.fill(range, content);
        asked = undefined;
      }
      if (filler.leftBytes < left) post({ progress: { leftBytes: filler.leftBytes, faults } });
      await setImmediate();
    }
    ended = true;
    post({ done: true });
  } catch (error) {
    fail(error);
  }
}

function answerAll(ask: Ask): void {
  const asked = new Map<number, FileRange>();
  process.once('exit', () => {
    const error = plainError(new Error('the thread of the page source ended'));
    // The latest is the one that an access waits for.
    const [range] = [...asked.values()].reverse();
    post({ error, ...(range && { range }) });
  });
  port.on('message', async (question: ToThread | 'stop') => {
    if (question === 'stop') process.exit();
    const { id, range } = question;
    asked.set(id, range);
    try {
      post({ id, content: await ask(range) });
    } catch (error) {
      post({ id, error: plainError(error), range });
    }
    asked.delete(id);
  });
}

try {
  const ask = await openSource(module, data);
  post({ ready: true });
  port.once('message', async (shares: Shares | 'stop') => {
    if (shares === 'stop') process.exit();
    if (shares === null) return answerAll(ask);
    await fillAll(ask, shares);
    process.exit();
  });
} catch (error) {
  post({ error: plainError(error) });
  port.close();
}
