import type { FileRange } from '../guest_range.ts';
import { bytes } from '../kernel/arguments.ts';
import { rangeError, typeError } from '../validate.ts';

/** Pages, or null for zeros. */
export type PageContent = Uint8Array | null;

/** What a module exports that has the pages of a memory. It runs on the pager's own thread. */
export interface PageSourceModule {
  /** Called once, before any page is missing: opens connections and files. */
  readonly setup?: (data: unknown) => void | Promise<void>;
  /**
   * Called when an access waits for pages, and for those that are fetched before anybody does. A range is whole pages of the memory; the answer has its
   * size, or is null where all of it is zeros. What it throws ends the pager: the source has failed.
   */
  readonly onMissing: (range: FileRange) => PageContent | Promise<PageContent>;
}

/** The word of the shared counters that asks a thread to stop. */
export const STOP = 1;

export type Ask = (range: FileRange) => Promise<PageContent>;

/** The source of a module, set up. */
export async function openSource(module: string, data: unknown): Promise<Ask> {
  const { setup, onMissing } = (await import(module)) as PageSourceModule;
  if (typeof onMissing !== 'function') throw typeError(`${module} exports no function onMissing`);
  if (setup !== undefined && typeof setup !== 'function') throw typeError(`${module}: setup must be a function`);
  await setup?.(data);
  return async (range) => {
    const answer = await onMissing({ ...range });
    if (answer === null) return null;
    const content = bytes('what onMissing returned', answer);
    if (content.length !== range.size)
      throw rangeError(`onMissing was asked for ${range.size} bytes and returned ${content.length}`);
    return content;
  };
}
