import { errnoName } from './uapi.ts';

interface KvmErrorOptions {
  readonly code: string;
  readonly message: string;
  readonly errno?: number;
  readonly syscall?: string;
  readonly request?: string | null;
  readonly args?: Readonly<Record<string, unknown>>;
  readonly errorOffset?: number;
  readonly cause?: unknown;
}

/** A call that failed, or was refused before it reached a kernel. */
export class KvmError extends Error {
  override readonly name = 'KvmError';
  /** 'EINVAL', 'EFAULT', …; or of this library: 'UNSUPPORTED' (the host lacks something, which the message names), 'ERR_CLOSED'. */
  readonly code: string;
  /** Negative, like Node's system errors; 0 for errors of this library. */
  readonly errno: number;
  /** 'ioctl', 'fallocate', 'mmap' …; '' where no system call was made. */
  readonly syscall: string;
  /** 'KVM_SET_MEMORY_ATTRIBUTES' …; null unless the system call is an ioctl. */
  readonly request: string | null;
  readonly args: Readonly<Record<string, unknown>>;
  /** The first byte of the file or guest address in the way, where one is known. */
  declare readonly errorOffset?: number;

  constructor(options: KvmErrorOptions) {
    super(options.message, options.cause === undefined ? undefined : { cause: options.cause });
    this.code = options.code;
    this.errno = options.errno ?? 0;
    this.syscall = options.syscall ?? '';
    this.request = options.request ?? null;
    this.args = options.args ?? {};
    if (options.errorOffset !== undefined) this.errorOffset = options.errorOffset;
  }

  static closed(what: string): KvmError {
    return new KvmError({ code: 'ERR_CLOSED', message: `${what} is closed` });
  }

  static unsupported(message: string): KvmError {
    return new KvmError({ code: 'UNSUPPORTED', message });
  }
}

/** What to do about an errno whose rule nobody knows. */
const advice: Readonly<Record<string, string>> = {
  ENOMEM: 'the host is out of memory, or a limit of this process is reached',
  EMFILE: 'this process has too many open files (ulimit -n)',
  ENFILE: 'the host has too many open files',
  EIO: 'the VM belongs to another process, the kernel has given it up, or a protected guest met memory of a file that is not on tmpfs',
  ENOTTY: 'this kernel does not have the request',
  EINTR: 'a signal came first',
};

/** A system call as a message names it. */
export interface Call {
  readonly syscall: string;
  /** Of an ioctl. */
  readonly request?: string;
  readonly args?: Readonly<Record<string, unknown>>;
}

/** Turns a negative result into the error a person can act on. `reason` is the broken rule, where one is known. */
export function systemError(result: number, call: Call, reason: string | null, errorOffset?: number): KvmError {
  const code = errnoName(result);
  const why = reason ?? advice[code] ?? 'the kernel gave no reason';
  return new KvmError({
    code,
    errno: result,
    message: `${call.request ?? call.syscall}: ${why} (${code})`,
    syscall: call.syscall,
    ...(call.request ? { request: call.request } : {}),
    ...(call.args ? { args: call.args } : {}),
    ...(errorOffset === undefined ? {} : { errorOffset }),
  });
}
