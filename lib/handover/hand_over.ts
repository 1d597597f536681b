import { setTimeout } from 'node:timers/promises';
import { KvmError, systemError } from '../errors.ts';
import { bytes } from '../kernel/arguments.ts';
import type { Kernel } from '../kernel/kernel.ts';
import { Kvm } from '../kvm.ts';
import { ERRNO, POLLIN, SOCK_SEQPACKET } from '../uapi.ts';
import { abortSignal, options, text, typeError } from '../validate.ts';
import { Vm } from '../vm.ts';
import { freeze } from './freeze.ts';
import { adoptMemory, checked, imageData, MemoryFds } from './memory_image.ts';

export interface HandOverOptions {
  /** Where to wait for the successor: a path for a Unix socket, or an abstract name with a leading '@', which every local user can reach. */
  readonly path: string;
  /**
   * Called when the successor has mapped the memory and nothing is frozen yet: the moment to stop vCPUs. What it returns goes to the successor as `data`:
   * registers, device states, whatever the memory does not hold.
   */
  readonly prepare?: () => undefined | Uint8Array | Promise<undefined | Uint8Array>;
  /** Cancels; the VM goes on as it was. */
  readonly signal?: AbortSignal;
}

export interface HandOverReport {
  /** From the freeze to the successor's word that it has everything: milliseconds, whatever the memory's size. */
  readonly pausedMilliseconds: number;
  /** Bytes of guest memory that changed hands, none of which was copied. */
  readonly bytes: number;
}

export interface TakeOverOptions {
  /** Where the predecessor waits. */
  readonly path: string;
  readonly signal?: AbortSignal;
}

export interface TakenMemory {
  /** A VM with the predecessor's memslots, memory and attributes. It has no vCPUs yet. */
  readonly vm: Vm;
  /** What the predecessor's `prepare` returned. */
  readonly data: Uint8Array;
}

/** fds of one message. */
const MESSAGE_FDS = 32;
/** How often to look whether the other side has said something: milliseconds. */
const LOOK = 1;
/** In the order in which they are said: by the successor, but for `yours`. */
const WORD = { built: 1, ready: 2, yours: 3, done: 4 } as const;

/**
 * Gives the memory of a VM to a successor, in this process or another, without copying a byte: its files go over a Unix socket. While
 * the successor maps them the guest runs; then, until the successor has everything, the VM is frozen: no page comes or goes, nothing changes
 * sides, and no vCPU of this thread runs (`EPERM`). If it is cancelled, or the successor dies, all of it thaws and the VM goes on. Afterwards the memory is the successor's: the VM stays frozen
 * and is there to be closed.
 *
 * @throws KvmError `UNSUPPORTED` memory that is no file, or a guest_memfd, which serves one VM until `link` exists · `EADDRINUSE` the path is
 *   taken · `EBUSY` a vCPU runs, or a conversion is at work · `EPIPE` the successor went away · `EPERM` the VM is being handed over already · `ERR_CLOSED` · the
 *   signal's reason · what `prepare` threw
 * @see unix(7), SCM_RIGHTS
 */
export async function handOver(vm: Vm, given: HandOverOptions): Promise<HandOverReport> {
  if (!(vm instanceof Vm)) throw typeError('vm must be a Vm');
  const { path, prepare, signal } = options('options', given);
  text('options.path', path);
  if (prepare !== undefined && typeof prepare !== 'function') throw typeError('options.prepare must be a function');
  if (signal !== undefined) abortSignal('options.signal', signal);
  signal?.throwIfAborted();
  const { kernel, assertOpen, assertOwn } = vm.backing;
  assertOpen();
  assertOwn();
  // What cannot be handed over is to be known now, and not when the successor is there.
  new MemoryFds(vm, new Uint8Array())[Symbol.dispose]();
  const check = (): void => {
    assertOpen();
    vm.assertThawed();
  };
  const [connection, stop] = await successor(kernel, path, signal);
  let thaw: (() => void) | null = null;
  try {
    // First the files, while the guest runs: to map them and to make memslots may take the successor long.
    assertOpen();
    using early = new MemoryFds(vm, new Uint8Array());
    sendFds(kernel, connection, early.fds);
    await expect(kernel, connection, WORD.built, signal, check);
    const data = bytes('what prepare returned', (await prepare?.()) ?? new Uint8Array());
    signal?.throwIfAborted();
    assertOpen();
    const start = performance.now();
    thaw = freeze(vm, 'the memory of this VM is being handed over: cancel that, or close the VM');
    using memory = new MemoryFds(vm, data);
    sendFds(kernel, connection, memory.isSame(early) ? memory.fds.slice(0, 1) : memory.fds);
    await expect(kernel, connection, WORD.ready, signal, assertOpen);
    say(kernel, connection, WORD.yours);
    // From here on only the successor's death gives the memory back.
    await expect(kernel, connection, WORD.done);
    return { pausedMilliseconds: performance.now() - start, bytes: memory.bytes };
  } catch (error) {
    thaw?.();
    throw error;
  } finally {
    kernel.close(connection);
    stop();
  }
}

/**
 * Takes the memory that a predecessor hands over at this path, and makes a VM around it.
 *
 * @throws KvmError `ENOENT`, `ECONNREFUSED` nobody waits there · `EPIPE` the predecessor went away or cancelled · `EINVAL` what came is no image of
 *   this machine · `ERR_CLOSED` · the signal's reason · as kvm.createVm()
 */
export async function takeOver(kvm: Kvm, given: TakeOverOptions): Promise<TakenMemory> {
  if (!(kvm instanceof Kvm)) throw typeError('kvm must be a Kvm');
  const { path, signal } = options('options', given);
  text('options.path', path);
  if (signal !== undefined) abortSignal('options.signal', signal);
  signal?.throwIfAborted();
  const { kernel, assertOpen } = kvm.backing;
  assertOpen();
  const connection = checked(kernel, kernel.socket(SOCK_SEQPACKET), 'socket');
  let taken: TakenMemory | null = null;
  try {
    const connected = kernel.connect(connection, path);
    if (connected < 0)
      throw systemError(
        connected,
        { syscall: 'connect', args: { path } },
        kernel.explain() ?? `nobody hands memory over at ${path}`,
      );
    taken = adoptMemory(kvm, kernel, await receiveFds(kernel, connection, signal));
    say(kernel, connection, WORD.built);
    // The image again, with the data; and all files only if the layout has changed meanwhile.
    const fds = await receiveFds(kernel, connection, signal);
    if (fds.length === 1) {
      taken = { vm: taken.vm, data: imageData(kernel, fds[0] as number) };
    } else {
      discard(taken.vm);
      taken = null;
      taken = adoptMemory(kvm, kernel, fds);
    }
    say(kernel, connection, WORD.ready);
    await expect(kernel, connection, WORD.yours, signal);
    // If the predecessor is gone by now, the memory is ours all the more.
    kernel.sendmsg(connection, Uint8Array.of(WORD.done), []);
    return taken;
  } catch (error) {
    if (taken) discard(taken.vm);
    throw error;
  } finally {
    kernel.close(connection);
  }
}

function discard(vm: Vm): void {
  const memories = new Set([...vm.memslots.values()].flatMap(({ hostMemory }) => hostMemory ?? []));
  vm.close();
  for (const memory of memories) memory.close();
}

async function successor(
  kernel: Kernel,
  path: string,
  signal: AbortSignal | undefined,
): Promise<[connection: number, stop: () => void]> {
  const listener = checked(kernel, kernel.socket(SOCK_SEQPACKET), 'socket');
  let named = false;
  const stop = (): void => {
    if (named && !path.startsWith('@')) kernel.unlink(path);
    kernel.close(listener);
  };
  try {
    const call = { syscall: 'bind', args: { path } };
    const result = kernel.bind(listener, path);
    const why = result === -ERRNO.EADDRINUSE ? `${path} is taken` : `no socket can be made at ${path}`;
    if (result < 0) throw systemError(result, call, why);
    named = true;
    checked(kernel, kernel.listen(listener, 1), 'listen');
    await readable(kernel, listener, signal);
    return [checked(kernel, kernel.accept4(listener), 'accept4'), stop];
  } catch (error) {
    stop();
    throw error;
  }
}

async function readable(kernel: Kernel, fd: number, signal?: AbortSignal, check?: () => void): Promise<void> {
  while (checked(kernel, kernel.poll(fd, POLLIN), 'poll') === 0) {
    await setTimeout(LOOK);
    signal?.throwIfAborted();
    check?.();
  }
}

function sendFds(kernel: Kernel, connection: number, fds: readonly number[]): void {
  const messages = Math.ceil(fds.length / MESSAGE_FDS);
  for (let index = 0; index < messages; index++) {
    const part = fds.slice(index * MESSAGE_FDS, (index + 1) * MESSAGE_FDS);
    const head = new Uint8Array(new Uint32Array([fds.length]).buffer);
    sent(kernel, kernel.sendmsg(connection, head, part));
  }
}

async function receiveFds(kernel: Kernel, connection: number, signal: AbortSignal | undefined): Promise<number[]> {
  const fds: number[] = [];
  try {
    const head = new Uint32Array(1);
    do {
      await readable(kernel, connection, signal);
      const part: number[] = [];
      const length = checked(kernel, kernel.recvmsg(connection, new Uint8Array(head.buffer), part), 'recvmsg');
      fds.push(...part);
      if (length === 0) throw gone('predecessor');
      if (length !== 4 || part.length === 0)
        throw new KvmError({ code: 'EINVAL', message: 'what waits there hands no memory over' });
    } while (fds.length < (head[0] as number));
    return fds;
  } catch (error) {
    for (const fd of fds) kernel.close(fd);
    throw error;
  }
}

function say(kernel: Kernel, connection: number, word: number): void {
  sent(kernel, kernel.sendmsg(connection, Uint8Array.of(word), []));
}

function sent(kernel: Kernel, result: number): void {
  if (result === -ERRNO.EPIPE) throw gone('other side');
  checked(kernel, result, 'sendmsg');
}

async function expect(
  kernel: Kernel,
  connection: number,
  word: number,
  signal?: AbortSignal,
  check?: () => void,
): Promise<void> {
  await readable(kernel, connection, signal, check);
  const heard = new Uint8Array(1);
  const fds: number[] = [];
  const length = kernel.recvmsg(connection, heard, fds);
  for (const fd of fds) kernel.close(fd);
  if (length === 0 || length === -ERRNO.ECONNRESET) throw gone(word === WORD.yours ? 'predecessor' : 'successor');
  checked(kernel, length, 'recvmsg');
  if (heard[0] !== word) throw new KvmError({ code: 'EINVAL', message: 'the other side does not hand memory over' });
}

function gone(who: string): KvmError {
  return new KvmError({
    code: 'EPIPE',
    errno: -ERRNO.EPIPE,
    message: `the ${who} went away: nothing has changed (EPIPE)`,
  });
}
