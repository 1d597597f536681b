import { hex } from '../../format.ts';
import {
  F_SEAL_WRITE,
  GUEST_MEMFD_FLAG_MMAP,
  HUGE_SHIFT,
  MAP_ANONYMOUS,
  MAP_FIXED,
  MAP_FIXED_NOREPLACE,
  MAP_GROWSDOWN,
  MAP_HUGETLB,
  MAP_PRIVATE,
  MAP_SHARED,
  MAP_SHARED_VALIDATE,
  MAP_TYPE,
  PROT_EXEC,
  PROT_WRITE,
} from '../../uapi.ts';
import { MAP_GUEST_SHARED } from '../../uapi_proposed.ts';
import { big, isAligned, isZero } from '../arguments.ts';
import type { U64 } from '../kernel.ts';
import type { Machine } from '../machine.ts';
import { type Rule, rule } from '../rules/rule.ts';
import { GuestMemfdFile, type OpenFile } from '../state.ts';
import { MemoryFile } from './memory_file.ts';

export interface MmapRequest {
  readonly length: U64;
  readonly prot: number;
  readonly flags: number;
  readonly offset: U64;
  /** undefined: the fd is not open, or the mapping is anonymous. */
  readonly file: OpenFile | undefined;
}

const MAX_FILE_SIZE = (1n << 63n) - 1n;
const MAX_U64 = (1n << 64n) - 1n;
/** LEGACY_MAP_MASK: what MAP_SHARED_VALIDATE lets pass on any file; MAP_SYNC is not in it. */
const LEGACY_FLAGS = 0x7f9f3 | (21 << HUGE_SHIFT) | (30 << HUGE_SHIFT);
const mappable: readonly (string | undefined)[] = ['gmem', 'file', 'secret'];
const anonymous = (r: MmapRequest): boolean => (r.flags & MAP_ANONYMOUS) !== 0;
const roundUp = (length: U64, page: number): bigint =>
  ((big(length) + BigInt(page) - 1n) / BigInt(page)) * BigInt(page);

/** mmap(2). Contract §8.1, whose numbers stand in the comments. */
export const mmapRules: readonly Rule<Machine, MmapRequest>[] = [
  rule('EINVAL', 'mmap-fixed', (_machine, { flags }) => {
    return (
      (flags & (MAP_FIXED | MAP_FIXED_NOREPLACE)) !== 0 &&
      'a mapping at a fixed address could replace memory of the process'
    );
  }),
  // 1–4
  rule(
    'EINVAL',
    'mmap-offset',
    ({ pageSize }, { offset }) =>
      !isAligned(offset, pageSize) && `offset ${hex(offset)} is not a multiple of the page size, ${pageSize}`,
  ),
  rule('EBADF', 'mmap-fd', (_machine, r) => !anonymous(r) && !r.file && 'the fd is not open'),
  rule(
    'EINVAL',
    'mmap-hugetlb',
    (_machine, r) => !anonymous(r) && (r.flags & MAP_HUGETLB) !== 0 && 'MAP_HUGETLB is for anonymous memory here',
  ),
  rule('EINVAL', 'mmap-length', (_machine, { length }) => isZero(length) && 'the length is 0'),
  rule(
    'ENOMEM',
    'mmap-length-wraps',
    ({ pageSize }, { length }) => roundUp(length, pageSize) >= 1n << 64n && `length ${hex(length)} wraps`,
  ),
  rule(
    'ENOMEM',
    'mmap-room',
    ({ pageSize, mmapEnd }, { length }) =>
      roundUp(length, pageSize) > mmapEnd && `no address space has ${hex(length)} bytes`,
  ),
  // 6–7
  rule('EOVERFLOW', 'mmap-file-end', ({ pageSize }, r) => {
    // Only regular files have that size; for other kinds the limit is what 64 bits can say.
    const limit = mappable.includes(r.file?.kind) ? MAX_FILE_SIZE : MAX_U64;
    return (
      !anonymous(r) && big(r.offset) + roundUp(r.length, pageSize) > limit && 'the range ends past the largest file'
    );
  }),
  rule('EINVAL', 'mmap-type', (_machine, r) => {
    const type = r.flags & MAP_TYPE;
    const known = type === MAP_SHARED || type === MAP_PRIVATE || (type === MAP_SHARED_VALIDATE && !anonymous(r));
    return !known && 'a mapping is MAP_SHARED or MAP_PRIVATE';
  }),
  rule('EOPNOTSUPP', 'mmap-validate', (machine, { flags, file }) => {
    const special = machine.proposals.has('special-mapping') && file instanceof GuestMemfdFile ? MAP_GUEST_SHARED : 0;
    const unknown = (flags & MAP_TYPE) === MAP_SHARED_VALIDATE && (flags & ~(LEGACY_FLAGS | special)) !== 0;
    return unknown && `the file does not support all of the flags ${hex(flags >>> 0)}`;
  }),
  rule('EPERM', 'memfd-sealed', (_machine, { file, flags, prot }) => {
    const writes = (flags & MAP_TYPE) !== MAP_PRIVATE && (prot & PROT_WRITE) !== 0;
    return (
      writes && file instanceof MemoryFile && (file.seals & F_SEAL_WRITE) !== 0 && 'the file is sealed against writing'
    );
  }),
  rule('EPERM', 'guest-sealed', (_machine, { file }) => {
    return file instanceof MemoryFile && file.isForGuest && 'the file is sealed for a guest and cannot be mapped';
  }),
  // 8–11
  // Files that lie on no disk are on file systems mounted noexec, those that cannot be mapped at all too; KVM's since Linux 6.16.
  rule('EPERM', 'noexec', (machine, { prot, file }) => {
    const ofKvm = file?.kind === 'vm' || file?.kind === 'vcpu' || file?.kind === 'gmem';
    const plain = !file || file.kind === 'file' || file.kind === 'kvm' || (ofKvm && !machine.since('6.18'));
    return !plain && (prot & PROT_EXEC) !== 0 && 'this kind of file cannot be mapped executable';
  }),
  rule('ENODEV', 'not-mappable', (machine, r) => {
    const kinds = mappable.filter((kind) => kind !== 'gmem' || machine.since('6.18'));
    return !anonymous(r) && !kinds.includes(r.file?.kind) && 'this kind of file cannot be mapped';
  }),
  rule('EINVAL', 'secret-private', (_machine, { flags, file }) => {
    return (
      file?.kind === 'secret' && (flags & MAP_TYPE) === MAP_PRIVATE && 'secret memory can only be mapped MAP_SHARED'
    );
  }),
  rule(
    'EINVAL',
    'gmem-growsdown',
    (_machine, r) =>
      (!anonymous(r) || (r.flags & MAP_TYPE) !== MAP_PRIVATE) &&
      (r.flags & MAP_GROWSDOWN) !== 0 &&
      'only private anonymous memory can be MAP_GROWSDOWN',
  ),
  rule('ENODEV', 'gmem-not-mappable', (_machine, { file }) => {
    return (
      file instanceof GuestMemfdFile &&
      !(file.flags & GUEST_MEMFD_FLAG_MMAP) &&
      'the guest_memfd was created without MMAP'
    );
  }),
  rule('EINVAL', 'gmem-private', (_machine, { flags, file }) => {
    return (
      file instanceof GuestMemfdFile &&
      (flags & MAP_TYPE) === MAP_PRIVATE &&
      'a guest_memfd can only be mapped MAP_SHARED'
    );
  }),
];
