import { Duplex } from 'node:stream';
import type { FileRange } from '../guest_range.ts';
import { checkedImage, type MemoryImage, showSlot } from '../handover/memory_image.ts';
import type { HostMemory } from '../host_memory.ts';
import { Kvm } from '../kvm.ts';
import { Pager } from '../pager/pager.ts';
import { abortSignal, fileRange, integer, options, text, typeError } from '../validate.ts';
import type { Vm } from '../vm.ts';
import { FRAME, type Frame, frames, next, PAGES_HEAD, readPagesHead, send, wrong } from './frames.ts';
import { writeMemory } from './memory_copy.ts';

export interface ReceiveMemoryOptions {
  /** Where servePages() answers, for what is left to post-copy: what net.connect() takes. Each memory makes a connection of its own, from a thread. */
  readonly pages?: { readonly path: string } | { readonly port: number; readonly host?: string };
  readonly signal?: AbortSignal;
}

export interface ReceivedMemory {
  /** A VM with the sender's memslots, memory and attributes. It has no vCPUs yet. */
  readonly vm: Vm;
  /** What the sender's `prepare` returned. */
  readonly data: Uint8Array;
  /** Those that bring what is left to post-copy. The guest may run at once. */
  readonly pagers: readonly Pager[];
}

type Connect = { readonly path: string } | { readonly port: number; readonly host?: string };

const client = new URL('./page_client.js', import.meta.url);

/**
 * Receives what sendMemory() sends, and makes a VM of it. When this resolves the memory is this side's.
 *
 * @throws KvmError `EPIPE` the other side is lost, or cancelled · `EINVAL` what came is no migration to this machine · `UNSUPPORTED` something is left to post-copy,
 *   and `pages` does not say where it is · `ERR_CLOSED` · the signal's reason · as kvm.createVm(), Pager.start()
 */
export async function receiveMemory(
  kvm: Kvm,
  stream: Duplex,
  given: ReceiveMemoryOptions = {},
): Promise<ReceivedMemory> {
  if (!(kvm instanceof Kvm)) throw typeError('kvm must be a Kvm');
  if (!(stream instanceof Duplex)) throw typeError('stream must be a Duplex');
  const { pages, signal } = options('options', given);
  const connect = pages === undefined ? null : connection(pages);
  if (signal !== undefined) abortSignal('options.signal', signal);
  signal?.throwIfAborted();
  const { kernel, assertOpen } = kvm.backing;
  assertOpen();
  const made: { close(): void }[] = [];
  const ignore = (): void => {};
  const cancel = (): void => void stream.destroy();
  stream.on('error', ignore);
  signal?.addEventListener('abort', cancel, { once: true });
  try {
    const source = frames(stream);
    const image = receivedImage(await next(source, FRAME.image), kvm);
    const vm = kvm.createVm({ type: image.type });
    made.push(vm);
    const memories = image.files.map(({ kind, size, ...file }) => {
      if (kind === 'guest_memfd') throw wrong('it has a guest_memfd');
      // A file of the other host is not one of ours.
      const options =
        kind === 'hugetlb'
          ? { kind, size, hugePageSize: (file as { alignment: number }).alignment }
          : { kind: kind === 'file' ? ('memfd' as const) : kind, size };
      const memory = kvm.createHostMemory(options);
      made.push(memory);
      return memory;
    });
    for (const slot of image.slots) showSlot(vm, slot, memories);
    const { data, missing } = await receivePages(source, memories, (memory, offset, content) => {
      signal?.throwIfAborted();
      memory.backing.assertOpen();
      writeMemory(kernel, memory, offset, content);
    });
    const pagers: Pager[] = [];
    for (const [index, ranges] of missing.entries()) {
      if (ranges.length === 0) continue;
      const memory = memories[index] as HostMemory;
      if (!connect) throw wrong('something is left to post-copy: `pages` must say where it is');
      const pager = await Pager.start(memory, { module: client, data: { connect, memory: index }, missing: ranges });
      made.unshift(pager);
      pagers.push(pager);
    }
    await send(stream, FRAME.ready);
    return { vm, data, pagers };
  } catch (error) {
    for (const each of made) each.close();
    throw signal?.aborted ? signal.reason : error;
  } finally {
    signal?.removeEventListener('abort', cancel);
    stream.off('error', ignore);
  }
}

/** A copy whose fields are as they should be. */
function connection(pages: Connect): Connect {
  const { path, port, host } = options('options.pages', pages) as { path?: string; port?: number; host?: string };
  if (path !== undefined) return { path: text('options.pages.path', path) };
  const checked = integer('options.pages.port', port, 1, 65535);
  return host === undefined ? { port: checked } : { port: checked, host: text('options.pages.host', host) };
}

function receivedImage(payload: Uint8Array, kvm: Kvm): MemoryImage {
  const image = checkedImage(json(payload) as MemoryImage);
  if (image.arch !== kvm.arch || image.pageSize !== kvm.pageSize)
    throw wrong(
      `the guest is ${image.arch} with pages of ${image.pageSize} bytes, this host ${kvm.arch}, ${kvm.pageSize}`,
    );
  return image;
}

async function receivePages(
  source: AsyncGenerator<Frame, void, void>,
  memories: readonly HostMemory[],
  write: (memory: HostMemory, offset: number, content: Uint8Array) => void,
): Promise<{ data: Uint8Array; missing: readonly FileRange[][] }> {
  let missing: FileRange[][] = [];
  for (;;) {
    const { value, done } = await source.next();
    const { type, payload } = done ? { type: 0, payload: await next(source, FRAME.state) } : value;
    if (type === FRAME.state) return { data: payload.slice(), missing };
    if (type === FRAME.missing) {
      missing = missingRanges(json(payload), memories);
      continue;
    }
    if (type !== FRAME.pages) throw wrong(`there is no frame ${type}`);
    const { memory: index, offset, size } = readPagesHead(payload);
    const memory = memories[index];
    const content = payload.subarray(PAGES_HEAD);
    if (!memory || content.length !== size || size > memory.size || offset > memory.size - size)
      throw wrong('pages lie outside of the memory');
    write(memory, offset, content);
  }
}

function missingRanges(given: unknown, memories: readonly HostMemory[]): FileRange[][] {
  if (!Array.isArray(given) || given.length !== memories.length) throw wrong('what is missing is no list');
  return given.map((ranges: unknown, index) => {
    if (!Array.isArray(ranges)) throw wrong('what is missing is no list');
    const { size: limit } = memories[index] as HostMemory;
    return ranges.map((range: unknown) => {
      const [offset, size] = Array.isArray(range) ? (range as number[]) : [];
      return fileRange('missing', { offset: offset as number, size: size as number }, limit);
    });
  });
}

function json(payload: Uint8Array): unknown {
  try {
    return JSON.parse(new TextDecoder().decode(payload));
  } catch {
    throw wrong('a frame is no JSON');
  }
}
