import { randomBytes } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import { join } from 'node:path';
import { KvmError } from '../errors.ts';
import type { Disk } from './disk.ts';

const LOCK = /^writer\.(\d{1,15})$/;

/** Who holds a lock, so that others can tell whether it lives. */
interface Holder {
  readonly pid: number;
  /** When the process started, in the kernel's ticks: a process number is used again. */
  readonly started: string;
  /** Where the number means something: this boot of this host, and its process namespace. */
  readonly host: string;
  readonly boot: string;
  readonly namespace: string;
}

function quietly(read: () => string): string {
  try {
    return read();
  } catch {
    return '';
  }
}

function startOf(pid: number): string {
  const stat = quietly(() => fs.readFileSync(`/proc/${pid}/stat`, 'utf8'));
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  // A process that has died and that nobody has waited for holds nothing any more.
  return fields[0] === 'Z' || fields[0] === 'X' ? '' : (fields[19] ?? '');
}

function self(): Holder {
  return {
    pid: process.pid,
    started: startOf(process.pid),
    host: os.hostname(),
    boot: quietly(() => fs.readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim()),
    namespace: quietly(() => fs.readlinkSync('/proc/self/ns/pid')),
  };
}

/** Whether the holder lives, as far as this process can know: when in doubt, it does. */
function lives(holder: Holder): boolean {
  const me = self();
  if (holder.boot !== me.boot) return holder.host !== me.host;
  if (holder.namespace !== me.namespace) return true;
  if (me.started !== '') return startOf(holder.pid) === holder.started;
  try {
    process.kill(holder.pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== 'ESRCH';
  }
}

/**
 * At most one process writes. The lock is the file `writer.<n>` with the highest number: it names the process that holds it, and a lock that is
 * let go, or whose process is gone, is followed by the next number. Whoever wants that has to create the file, which only one can; and the highest
 * one is never removed, so nobody creates a number that was overtaken without seeing it.
 */
export class WriterLock {
  readonly #path: string;

  /** @throws KvmError `EBUSY` another one writes */
  static take(disk: Disk, folder: string): WriterLock {
    for (;;) {
      const before = highest(disk, folder);
      if (before > 0) assertGone(disk, join(folder, `writer.${before}`));
      const path = join(folder, `writer.${before + 1}`);
      if (!create(disk, folder, path)) continue;
      if (highest(disk, folder) > before + 1) {
        disk.fs.rmSync(path, { force: true });
        continue;
      }
      for (const name of disk.fs.readdirSync(folder)) {
        const number = Number(LOCK.exec(name)?.[1]);
        if (number <= before) disk.fs.rmSync(join(folder, name), { force: true });
      }
      return new WriterLock(path);
    }
  }

  private constructor(path: string) {
    this.#path = path;
  }

  get path(): string {
    return this.#path;
  }

  /** An empty file is a lock that was let go. */
  static release(path: string): void {
    try {
      fs.truncateSync(path, 0);
    } catch {
      // The folder is gone, and the lock with it.
    }
  }
}

function highest(disk: Disk, folder: string): number {
  return Math.max(0, ...disk.fs.readdirSync(folder).map((name) => Number(LOCK.exec(name)?.[1] ?? 0)));
}

function assertGone(disk: Disk, path: string): void {
  let text: string;
  try {
    text = disk.fs.readFileSync(path, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return;
    throw error;
  }
  if (text === '') return;
  let holder: Holder;
  try {
    holder = JSON.parse(text) as Holder;
  } catch {
    holder = { pid: 0, started: '', host: '', boot: '', namespace: '' };
  }
  if (typeof holder?.pid === 'number' && Number.isInteger(holder.pid) && holder.pid > 0 && !lives(holder)) return;
  throw new KvmError({
    code: 'EBUSY',
    message: `another process (${holder?.pid || 'unknown'} on ${holder?.host || 'an unknown host'}) writes to this store: close it there, or open it with { readOnly: true }; if that process is gone for certain, remove ${path}`,
    args: { path },
  });
}

/** The whole file appears at once, by its second name. False when the number is taken. */
function create(disk: Disk, folder: string, path: string): boolean {
  const draft = join(folder, `.lock-${process.pid}-${randomBytes(6).toString('hex')}`);
  disk.write(draft, Buffer.from(JSON.stringify(self())));
  try {
    disk.fs.linkSync(draft, path);
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') return false;
    throw error;
  } finally {
    disk.fs.rmSync(draft, { force: true });
  }
}
