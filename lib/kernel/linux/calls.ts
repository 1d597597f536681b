import { i32 } from '../arguments.ts';
import type { Result, U64 } from '../kernel.ts';
import { explain, type Rule } from '../rules/rule.ts';
import { FileTable, type OpenFile } from '../state.ts';
import type { Addon } from './addon.ts';
import { Command } from './command.ts';

/** What the calls share: the addon, the open files, and the reason of the latest refusal. */
export abstract class LinuxCalls {
  protected readonly native: Addon;
  protected readonly command: Command;
  protected readonly files = new FileTable();
  protected refusal: string | null = null;

  constructor(native: Addon) {
    this.native = native;
    this.command = new Command(native.command);
  }

  explain(): string | null {
    return this.refusal;
  }

  /** The fd as it is when this kernel opened it, -1 otherwise: so that the kernel itself answers EBADF, at its place in the order. */
  protected own(fd: number): number {
    return this.files.get(i32('fd', fd)) ? fd : -1;
  }

  protected ioctlWord(fd: number, request: number, argument: U64): Result {
    this.command.i32(0, fd).u64(1, request).u64(2, argument);
    return this.native.ioctl();
  }

  protected opened(fd: number, file: () => OpenFile): Result {
    return fd < 0 ? this.answer(fd) : this.files.put(fd, file());
  }

  protected refused<S, R>(result: Result, rules: readonly Rule<S, R>[], subject: S | undefined, request: R): Result {
    this.refusal = subject && result < 0 ? (explain(rules, subject, request, -result)?.sentence ?? null) : null;
    return result;
  }

  protected answer(result: Result): Result {
    if (result < 0) this.refusal = null;
    return result;
  }
}
