import type { Arch, ModelOptions } from '../../model_options.ts';
import { ERRNO, type ErrnoName } from '../../uapi.ts';
import { i32, u64 } from '../arguments.ts';
import type { Result } from '../kernel.ts';
import { Machine } from '../machine.ts';
import { check, type Rule, type Violation } from '../rules/rule.ts';
import { FileTable, type OpenFile } from '../state.ts';
import { AddressSpace } from './address_space.ts';

/** RLIMIT_NOFILE of the process the model plays. */
const MAX_FILES = 65536;

/** What is shared by the processes of one software kernel. */
interface Shared {
  readonly model: ModelOptions;
  ino: bigint;
}

/** A process of the software kernel: its open files, its address space, and why it was last refused something. */
export abstract class SoftwareProcess {
  readonly name = 'software';
  readonly arch: Arch;
  readonly release: string;
  readonly pageSize: number;
  protected readonly machine: Machine;
  protected readonly files: FileTable;
  protected readonly memory: AddressSpace;
  /** fds that survive exec: those without FD_CLOEXEC. */
  protected readonly inheritable: Set<number>;
  protected readonly shared: Shared;
  #violation: Violation | string | null = null;

  /** @param parent The process this one is forked from: it starts with the same files under the same numbers, and a copy of the memory. */
  protected constructor(model: ModelOptions, parent?: SoftwareProcess) {
    this.shared = parent?.shared ?? { model, ino: 1n };
    this.machine = Machine.model(model);
    this.arch = this.machine.arch;
    this.release = this.machine.release;
    this.pageSize = this.machine.pageSize;
    this.files = parent ? parent.files.fork() : new FileTable(3);
    this.memory = parent ? parent.memory.fork() : new AddressSpace(this.machine);
    this.inheritable = new Set(parent?.inheritable);
  }

  explain(): string | null {
    const violation = this.#violation;
    return typeof violation === 'string' ? violation : (violation?.sentence ?? null);
  }

  /** The name of the rule that the latest call broke. */
  protected get brokenRule(): string | null {
    return typeof this.#violation === 'string' ? null : (this.#violation?.rule ?? null);
  }

  // ── threads

  shareFile(fd: number): Result {
    return this.files.get(i32('fd', fd)) ? this.#oneThread() : this.badFd(fd);
  }

  takeFile(share: number): Result {
    u64('share', share);
    return this.#oneThread();
  }

  isShared(share: number): boolean {
    u64('share', share);
    return false;
  }

  shareMapping(mapping: number): Result {
    i32('mapping', mapping);
    return this.#oneThread();
  }

  takeMapping(share: number): Result {
    return this.takeFile(share);
  }

  #oneThread(): Result {
    return this.refuse('EOPNOTSUPP', 'a software kernel and all that it has live on the thread that made it');
  }

  /** The file behind an fd that operations may use: an O_PATH fd only names one. */
  protected file(fd: number): OpenFile | undefined {
    const file = this.files.get(fd);
    return file?.kind === 'path' ? undefined : file;
  }

  protected newIno(): bigint {
    return this.shared.ino++;
  }

  protected install(create: () => OpenFile, closeOnExec = true): Result {
    const refused = this.noFreeFd();
    if (refused !== null) return refused;
    const fd = this.files.add(create());
    if (!closeOnExec) this.inheritable.add(fd);
    return fd;
  }

  protected noFreeFd(): Result | null {
    return this.files.size >= MAX_FILES ? this.refuse('EMFILE', `the process has ${MAX_FILES} files open`) : null;
  }

  protected check<S, R>(rules: readonly Rule<S, R>[], subject: S, request: R): Result | null {
    const violation = check(rules, subject, request);
    if (!violation) return null;
    this.#violation = violation;
    return -violation.errno;
  }

  protected badFd(fd: number): Result {
    return this.refuse('EBADF', `fd ${fd} is not one this kernel opened`);
  }

  protected refuse(errno: ErrnoName, sentence: string): Result {
    return this.refuseErrno(ERRNO[errno], sentence);
  }

  protected refuseErrno(errno: number, sentence: string): Result {
    this.#violation = sentence;
    return -errno;
  }

  /** A result whose sentence, if it is an error, nobody knows. */
  protected answer(result: Result): Result {
    if (result < 0) this.#violation = null;
    return result;
  }
}
