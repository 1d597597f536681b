import { formatBytes, hex } from '../../format.ts';
import {
  ERRNO,
  MAP_ANONYMOUS,
  MAP_POPULATE,
  MAP_PRIVATE,
  MAP_SHARED_VALIDATE,
  MAP_TYPE,
  MLOCK_ONFAULT,
  MS_ASYNC,
  MS_INVALIDATE,
  MS_SYNC,
  O_CLOEXEC,
  PROT_READ,
  RLIMIT_MEMLOCK,
  UFFD_FEATURE_WP_ASYNC,
  UFFDIO_REGISTER_MODE_MISSING,
  UFFDIO_REGISTER_MODE_WP,
} from '../../uapi.ts';
import { MAP_GUEST_SHARED } from '../../uapi_proposed.ts';
import { shown } from '../../validate.ts';
import { bytes, i32, isAligned, isZero, toPages, u32, u64 } from '../arguments.ts';
import type { Result, U64 } from '../kernel.ts';
import type { OpenFile } from '../state.ts';
import { isAdvice } from './address_space.ts';
import type { MappedFile, Mapping } from './mapping.ts';
import { MemoryFile } from './memory_file.ts';
import { mmapRules } from './mmap_rules.ts';
import { SocketCalls } from './socket_calls.ts';
import { SecretFile, SoftwareGuestMemfd } from './software_files.ts';
import { UserfaultFile } from './userfault_file.ts';

/** The most that one read of a userfaultfd gives. */
const UFFD_MESSAGES = 32;
const NO_LIMIT = (1n << 64n) - 1n;

type RangeCall = (mapping: Mapping, start: number, end: number) => Result;

/** The system calls on mappings, which are handles here. */
export abstract class MappingCalls extends SocketCalls {
  mmap(args: { length: U64; prot: number; flags: number; fd: number; offset: U64 }): Result {
    const flags = i32('flags', args.flags);
    const fd = i32('fd', args.fd);
    const request = {
      length: u64('length', args.length),
      prot: i32('prot', args.prot),
      flags,
      offset: u64('offset', args.offset),
      file: flags & MAP_ANONYMOUS ? undefined : this.file(fd),
    };
    const refused = this.check(mmapRules, this.machine, request);
    if (refused !== null) return refused;
    const pages = Math.ceil(Number(request.length) / this.pageSize);
    if (request.file instanceof SecretFile && !this.machine.since('7.3') && !this.memory.mayLock(pages))
      return this.refuse('EAGAIN', 'secret memory counts as locked, and this process may not lock that much');
    const shared = (flags & MAP_TYPE) !== MAP_PRIVATE;
    const pgoff = request.file ? toPages(request.offset, this.pageSize) : 0;
    const handle = this.memory.map(
      pages,
      shared,
      this.#mappedFile(request.file, shared, pages),
      pgoff,
      request.prot & 7,
      (flags & MAP_TYPE) === MAP_SHARED_VALIDATE && (flags & MAP_GUEST_SHARED) !== 0,
    );
    if (handle < 0) return this.refuse('ENOMEM', `no room for ${formatBytes(request.length)}`);
    if (flags & MAP_POPULATE) this.memory.populate(this.memory.get(handle) as Mapping, 0, pages, PROT_READ);
    return handle;
  }

  addressOf(mapping: number): bigint {
    const found = this.memory.get(i32('mapping', mapping));
    if (!found) throw new TypeError(`there is no mapping ${mapping}`);
    return found.address;
  }

  mprotect(mapping: number, offset: U64, length: U64, prot: number): Result {
    const wanted = i32('prot', prot);
    return this.#range(mapping, offset, length, (found, start, end) => this.memory.protect(found, start, end, wanted));
  }

  madvise(mapping: number, offset: U64, length: U64, advice: number): Result {
    const wanted = i32('advice', advice);
    const wrong =
      !isAdvice(this.machine, wanted) && `advice ${wanted} is unknown, or would poison memory of the machine`;
    const call: RangeCall = (found, start, end) => this.memory.advise(found, start, end, wanted);
    return this.#range(mapping, offset, length, call, { wrong });
  }

  async madviseAsync(mapping: number, offset: U64, length: U64, advice: number): Promise<Result> {
    return this.madvise(mapping, offset, length, advice);
  }

  mlock(mapping: number, offset: U64, length: U64): Result {
    const call: RangeCall = (found, start, end) => this.memory.lock(found, start, end);
    return this.#range(mapping, offset, length, call, { round: true });
  }

  mlock2(mapping: number, offset: U64, length: U64, flags: number): Result {
    const wanted = u32('flags', flags);
    const wrong = wanted > MLOCK_ONFAULT && 'mlock2 knows only MLOCK_ONFAULT';
    const call: RangeCall = (found, start, end) => this.memory.lock(found, start, end, wanted === MLOCK_ONFAULT);
    return this.#range(mapping, offset, length, call, { round: true, wrong });
  }

  getrlimit(resource: number, limit: { cur?: bigint; max?: bigint }): Result {
    const number = i32('resource', resource);
    if (number < 0 || number > 15) return this.refuse('EINVAL', `there is no resource ${number}`);
    const known = number === RLIMIT_MEMLOCK && Number.isFinite(this.machine.lockLimit);
    limit.cur = limit.max = known ? BigInt(this.machine.lockLimit) : NO_LIMIT;
    return 0;
  }

  munlock(mapping: number, offset: U64, length: U64): Result {
    const call: RangeCall = (found, start, end) => {
      if (!found.secret) found.locked.delete(start, end);
      return 0;
    };
    return this.#range(mapping, offset, length, call, { round: true });
  }

  msync(mapping: number, offset: U64, length: U64, flags: number): Result {
    const wanted = i32('flags', flags);
    const unknown = (wanted & ~7) !== 0 || (wanted & (MS_ASYNC | MS_SYNC)) === (MS_ASYNC | MS_SYNC);
    const call: RangeCall = ({ file, gmem, shared, locked }, start, end) => {
      const busy = (wanted & MS_INVALIDATE) !== 0 && locked.overlaps(start, end);
      // From the start on: what comes before the locked pages is synced first.
      if (busy && locked.get(start)) return -ERRNO.EBUSY;
      if (wanted & MS_SYNC && shared && (gmem || file instanceof SecretFile)) return -ERRNO.EINVAL;
      if (busy) return -ERRNO.EBUSY;
      return wanted & MS_SYNC && shared && file instanceof MemoryFile ? file.sync() : 0;
    };
    return this.#range(mapping, offset, length, call, { wrong: unknown && 'MS_ASYNC and MS_SYNC exclude each other' });
  }

  mbind(mapping: number, offset: U64, length: U64, policy: number, nodes: readonly number[]): Result {
    const [number, wanted] = [i32('policy', policy), Array.from(nodes, (node) => i32('nodes', node))];
    return this.#range(mapping, offset, length, (found, start, end) =>
      this.memory.bind(found, start, end, number, wanted),
    );
  }

  getMempolicy(mapping: number, offset: U64): Result {
    return this.#range(mapping, offset, 1, (found, start) => this.memory.policyAt(found, start), { round: true });
  }

  mincore(mapping: number, offset: U64, length: U64, residency: Uint8Array): Result {
    const plain = bytes('residency', residency);
    return this.#range(mapping, offset, length, (found, start, end) => {
      if (this.memory.touchable(plain) < end - start) return -ERRNO.EFAULT;
      this.memory.residency(found, start, end, plain);
      return 0;
    });
  }

  userfaultfd(flags: number): Result {
    return i32('flags', flags) & ~(O_CLOEXEC | 0o4000 | 1)
      ? this.refuse('EINVAL', 'unknown userfaultfd flags')
      : this.install(() => new UserfaultFile());
  }

  uffdioApi(uffd: number, features: U64): Result {
    const wanted = BigInt(u64('features', features));
    const file = this.file(i32('uffd', uffd));
    if (!file) return this.badFd(uffd);
    if (!(file instanceof UserfaultFile)) return this.refuse('ENOTTY', 'not a userfaultfd');
    if (file.features !== null || wanted >> 17n)
      return this.refuse('EINVAL', 'the API is set already, or a feature is unknown');
    file.features = wanted;
    return 0;
  }

  uffdioRegister(uffd: number, mapping: number, offset: U64, length: U64, mode: number): Result {
    const wanted = i32('mode', mode);
    const file = this.file(i32('uffd', uffd));
    if (!file) return this.badFd(uffd);
    if (!(file instanceof UserfaultFile)) return this.refuse('ENOTTY', 'not a userfaultfd');
    const { features } = file;
    return this.#range(mapping, offset, length, (found, start, end) => {
      if (features === null || wanted < 1 || wanted > 7) return -ERRNO.EINVAL;
      const asyncOnly = wanted === UFFDIO_REGISTER_MODE_WP && (features & BigInt(UFFD_FEATURE_WP_ASYNC)) !== 0n;
      if (found.gmem && !asyncOnly) return -ERRNO.EINVAL;
      return wanted & UFFDIO_REGISTER_MODE_MISSING ? file.watch(found, start, end) : 0;
    });
  }

  uffdioUnregister(uffd: number, mapping: number, offset: U64, length: U64): Result {
    return this.#userfault(uffd, mapping, offset, length, (_, found, start, end) => {
      found.userfault?.missing.delete(start, end);
      return 0;
    });
  }

  uffdioCopy(uffd: number, mapping: number, offset: U64, source: Uint8Array, mode: number): Result {
    const [plain, wanted] = [bytes('source', source), i32('mode', mode)];
    return this.#userfault(uffd, mapping, offset, plain.length, (file, found, start, end) => {
      if (wanted & ~3) return -ERRNO.EINVAL;
      return file.fill(found, start, end, (at, size) => found.store.write(at, plain.subarray(0, size)));
    });
  }

  uffdioZeropage(uffd: number, mapping: number, offset: U64, length: U64, mode: number): Result {
    const wanted = i32('mode', mode);
    return this.#userfault(uffd, mapping, offset, length, (file, found, start, end) => {
      if (wanted & ~1) return -ERRNO.EINVAL;
      return file.fill(found, start, end, (at, size) =>
        found.store.touch(at / this.pageSize, (at + size) / this.pageSize),
      );
    });
  }

  uffdRead(uffd: number, milliseconds: number, addresses: bigint[]): Result {
    i32('milliseconds', milliseconds);
    const file = this.file(i32('uffd', uffd));
    if (!(file instanceof UserfaultFile)) return this.badFd(uffd);
    if (file.features === null) return this.refuse('EINVAL', 'the API is not set');
    addresses.length = 0;
    addresses.push(...file.addresses.splice(0, UFFD_MESSAGES));
    return addresses.length;
  }

  serveFaults(uffd: number, serve: (() => void) | null): Result {
    if (serve !== null && typeof serve !== 'function') throw new TypeError('serve must be a function or null');
    const file = this.file(i32('uffd', uffd));
    if (!(file instanceof UserfaultFile)) return this.badFd(uffd);
    file.serve = serve;
    return 0;
  }

  peek(mapping: number, offset: U64, target: Uint8Array): Result {
    const at = Number(u64('offset', offset));
    const plain = bytes('target', target);
    const found = this.memory.get(i32('mapping', mapping));
    if (!found || at > found.pages * this.pageSize)
      return this.refuse('EFAULT', `mapping ${mapping} does not reach there`);
    const reached = this.memory.touchable(plain);
    if (reached === 0 && plain.length > 0)
      return this.refuse('EFAULT', 'the buffer lies in memory that cannot be touched');
    if (!this.memory.isWindow(plain)) return this.answer(this.memory.peek(found, at, plain.subarray(0, reached)));
    const apart = new Uint8Array(reached);
    const copied = this.memory.peek(found, at, apart);
    plain.set(apart.subarray(0, Math.max(0, copied)));
    return this.answer(copied);
  }

  poke(mapping: number, offset: U64, source: Uint8Array): Result {
    const at = Number(u64('offset', offset));
    const plain = bytes('source', source);
    const found = this.memory.get(i32('mapping', mapping));
    if (!found || at > found.pages * this.pageSize)
      return this.refuse('EFAULT', `mapping ${mapping} does not reach there`);
    const reached = this.memory.touchable(plain);
    if (reached === 0 && plain.length > 0)
      return this.refuse('EFAULT', 'the buffer lies in memory that cannot be touched');
    // A window of the same memory may be the buffer, and the copy goes page by page.
    return this.answer(
      this.memory.poke(found, at, this.memory.isWindow(plain) ? plain.slice(0, reached) : plain.subarray(0, reached)),
    );
  }

  window(mapping: number, offset: number, length: number): Uint8Array {
    const found = this.memory.get(i32('mapping', mapping));
    const inside = found && Number.isSafeInteger(offset) && Number.isSafeInteger(length) && offset >= 0 && length >= 0;
    if (!inside || offset + length > found.pages * this.pageSize)
      throw new TypeError(`mapping ${mapping} has no bytes ${shown(offset)}, +${shown(length)}`);
    const view = this.memory.window(found, offset, length);
    if (!view)
      throw new TypeError(`bytes ${offset}, +${length} lie in two windows of the software kernel that cannot be one`);
    return view;
  }

  releaseWindow(view: Uint8Array): void {
    this.memory.releaseWindow(bytes('view', view));
  }

  releaseWindows(mapping: number): Result {
    return this.answer(this.memory.releaseWindows(i32('mapping', mapping)));
  }

  munmap(mapping: number): Result {
    return this.answer(this.memory.unmap(i32('mapping', mapping)));
  }

  #userfault(
    uffd: number,
    mapping: number,
    offset: U64,
    length: U64,
    call: (file: UserfaultFile, mapping: Mapping, start: number, end: number) => Result,
  ): Result {
    const file = this.file(i32('uffd', uffd));
    if (!file) return this.badFd(uffd);
    if (!(file instanceof UserfaultFile)) return this.refuse('ENOTTY', 'not a userfaultfd');
    const size = u64('length', length);
    const whole = !isZero(size) && isAligned(size, this.pageSize);
    const wrong = (file.features === null || !whole) && 'the API is not set, or the length is not that of whole pages';
    return this.#range(mapping, offset, length, (found, start, end) => call(file, found, start, end), { wrong });
  }

  /**
   * A range of pages of a mapping. That it lies in the mapping is for the boundary to see, before the kernel looks at the other arguments:
   * first those of the call, then the alignment, then whether there is anything to do.
   */
  #range(
    mapping: number,
    offset: U64,
    length: U64,
    call: RangeCall,
    { round = false, wrong = false }: { round?: boolean; wrong?: string | false } = {},
  ): Result {
    const [at, size] = [u64('offset', offset), u64('length', length)];
    const found = this.memory.get(i32('mapping', mapping));
    const start = Math.floor(Number(at) / this.pageSize);
    const end = Math.ceil((Number(at) + Number(size)) / this.pageSize);
    if (!found || end > found.pages) return this.refuse('ENOMEM', 'the range is not mapped');
    if (wrong) return this.refuse('EINVAL', wrong);
    if (!round && !isAligned(at, this.pageSize))
      return this.refuse('EINVAL', `offset ${hex(at)} is not a multiple of ${this.pageSize}`);
    return start === end ? 0 : this.answer(call(found, start, end));
  }

  #mappedFile(file: OpenFile | undefined, shared: boolean, pages: number): MappedFile | null {
    if (file instanceof SoftwareGuestMemfd || file instanceof MemoryFile || file instanceof SecretFile) return file;
    if (!shared) return null;
    const memory = new MemoryFile(this.pageSize, this.newIno());
    memory.size = pages * this.pageSize;
    return memory;
  }
}
