import { formatBytes, hex } from '../../format.ts';
import {
  FALLOC_FL_COLLAPSE_RANGE,
  FALLOC_FL_INSERT_RANGE,
  FALLOC_FL_KEEP_SIZE,
  FALLOC_FL_PUNCH_HOLE,
  FALLOC_FL_UNSHARE_RANGE,
  FALLOC_FL_WRITE_ZEROES,
  FALLOC_FL_ZERO_RANGE,
  GiB,
  MiB,
} from '../../uapi.ts';
import { GUEST_MEMFD_FLAG_HUGETLB, GUEST_MEMFD_HUGE_SHIFT } from '../../uapi_proposed.ts';
import { big, hasOtherBits, isAligned, isNegative, isZero, low32, sumExceeds, toPages } from '../arguments.ts';
import type { U64 } from '../kernel.ts';
import { guestMemfdFlags, type Machine } from '../machine.ts';
import type { GuestMemfdFile, SplitProblem, VmFile } from '../state.ts';
import { type Rule, rule } from './rule.ts';

export interface CreateRequest {
  readonly size: U64;
  readonly flags: U64;
}

/** KVM_CREATE_GUEST_MEMFD. Contract §6. */
export const createGuestMemfdRules: readonly Rule<VmFile, CreateRequest>[] = [
  rule(
    ({ machine }) => (machine.isArm ? 'EINVAL' : 'ENOTTY'),
    'gmem-built',
    ({ machine }) =>
      !machine.hasGuestMemfd && 'this kernel has no guest_memfd (CONFIG_KVM_GUEST_MEMFD; Linux 6.8, on arm64 6.18)',
  ),
  rule('EINVAL', 'gmem-flags', (vm, { flags }) => {
    const allowed = guestMemfdFlags(vm.machine, vm);
    return (
      hasOtherBits(withoutFolioSize(vm.machine, flags), allowed) &&
      `guest_memfd flags ${hex(flags)} are not all supported by this VM, which has ${hex(allowed)}`
    );
  }),
  rule(
    'EINVAL',
    'gmem-size',
    (_vm, { size }) => (isZero(size) || isNegative(size)) && `a guest_memfd of ${size} bytes cannot be`,
  ),
  rule('EINVAL', 'gmem-huge-size', ({ machine }, { flags }) => {
    const wrong = machine.proposals.has('large-folios') && folioSize(flags) === undefined;
    return wrong && `flags ${hex(flags)} name no size of folios: 21 or 30 from bit 58 on, with flag 4`;
  }),
  rule('EINVAL', 'gmem-size-alignment', ({ machine }, { size }) => {
    return (
      !isAligned(size, machine.pageSize) &&
      `size ${formatBytes(size)} is not a multiple of the page size, ${machine.pageSize}`
    );
  }),
  rule('EINVAL', 'gmem-huge-alignment', ({ machine }, { size, flags }) => {
    const folio = machine.proposals.has('large-folios') ? folioSize(flags) : null;
    return folio && !isAligned(size, folio) && `size ${formatBytes(size)} is not a multiple of ${formatBytes(folio)}`;
  }),
];

/** A proposed flag has an argument in the bits above it. */
function withoutFolioSize(machine: Machine, flags: U64): U64 {
  const takesSize = machine.proposals.has('large-folios') && (low32(flags) & GUEST_MEMFD_FLAG_HUGETLB) !== 0;
  return takesSize ? big(flags) & ((1n << GUEST_MEMFD_HUGE_SHIFT) - 1n) : flags;
}

/** Bytes of the largest folios of a file created with these flags: null for single pages, undefined for a size that is none. */
export function folioSize(flags: U64): number | null | undefined {
  const shift = Number(big(flags) >> GUEST_MEMFD_HUGE_SHIFT);
  if (!(low32(flags) & GUEST_MEMFD_FLAG_HUGETLB)) return shift === 0 ? null : undefined;
  return shift === 0 || shift === 21 ? 2 * MiB : shift === 30 ? GiB : undefined;
}

export interface FallocateRequest {
  readonly mode: number;
  readonly offset: U64;
  readonly length: U64;
}

/** The operations of fallocate(2): at most one of them in a call. */
const operations: readonly number[] = [
  FALLOC_FL_PUNCH_HOLE,
  FALLOC_FL_COLLAPSE_RANGE,
  FALLOC_FL_ZERO_RANGE,
  FALLOC_FL_INSERT_RANGE,
  FALLOC_FL_UNSHARE_RANGE,
  FALLOC_FL_WRITE_ZEROES,
];
const allOperations = operations.reduce((all, one) => all | one);
const withKeepSize = FALLOC_FL_ZERO_RANGE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_UNSHARE_RANGE;
const MAX_FILE_SIZE = (1n << 63n) - 1n;

/** What the VFS checks before any file system sees the call. Contract §9, 2–4. */
export const vfsFallocateRules: readonly Rule<{ readonly machine: Machine }, FallocateRequest>[] = [
  rule('EINVAL', 'fallocate-range', (_kernel, { offset, length }) => {
    return (
      (isNegative(offset) || isNegative(length) || isZero(length)) && `range ${offset}, +${length} is negative or empty`
    );
  }),
  rule('EOPNOTSUPP', 'fallocate-mode', ({ machine }, { mode }) => {
    // Linux 6.17.
    const unknown = machine.since('6.18') ? 0 : FALLOC_FL_WRITE_ZEROES;
    const operation = mode & allOperations & ~unknown;
    const keep = mode & FALLOC_FL_KEEP_SIZE;
    const wrong =
      (mode & (unknown | ~(allOperations | FALLOC_FL_KEEP_SIZE))) !== 0 ||
      (operation !== 0 && !operations.includes(operation)) ||
      (operation === FALLOC_FL_PUNCH_HOLE && !keep) ||
      (keep !== 0 && operation !== 0 && !(operation & withKeepSize));
    return wrong && `mode ${hex(mode >>> 0)} is not a combination fallocate(2) knows`;
  }),
];

/** Contract §9, 5. */
export const fileSizeRule: Rule<unknown, FallocateRequest> = rule(
  'EFBIG',
  'fallocate-end',
  (_file, { offset, length }) => {
    return sumExceeds(offset, length, MAX_FILE_SIZE) && 'the range ends beyond 2^63-1';
  },
);

function punchProblem(file: GuestMemfdFile, { mode, offset, length }: FallocateRequest): SplitProblem | null {
  if (!(mode & FALLOC_FL_PUNCH_HOLE)) return null;
  const { pageSize } = file.vm.machine;
  const start = toPages(offset, pageSize);
  return file.splitProblem(start, start + toPages(length, pageSize));
}

/** fallocate(2) on a guest_memfd. Contract §9. */
export const fallocateRules: readonly Rule<GuestMemfdFile, FallocateRequest>[] = [
  ...vfsFallocateRules,
  fileSizeRule,
  rule('EOPNOTSUPP', 'gmem-fallocate-mode', (_file, { mode }) => {
    const known = mode === FALLOC_FL_KEEP_SIZE || mode === (FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE);
    return !known && `a guest_memfd can only allocate with KEEP_SIZE (1) and punch holes (3), not mode ${mode}`;
  }),
  rule('EINVAL', 'gmem-fallocate-alignment', ({ vm }, { offset, length }) => {
    const { pageSize } = vm.machine;
    const aligned = isAligned(offset, pageSize) && isAligned(length, pageSize);
    return !aligned && `range ${hex(offset)}, +${hex(length)} is not made of whole pages of ${pageSize} bytes`;
  }),
  rule('EINVAL', 'gmem-allocate-end', (file, { mode, offset, length }) => {
    const beyond = !(mode & FALLOC_FL_PUNCH_HOLE) && sumExceeds(offset, length, file.size);
    return (
      beyond &&
      `range ${formatBytes(offset)}, +${formatBytes(length)} ends past the end of the file, ${formatBytes(file.size)}`
    );
  }),
  rule(
    (file, request) => punchProblem(file, request)?.errno ?? 'ENOMEM',
    'gmem-punch-split',
    (file, request) => punchProblem(file, request)?.sentence,
  ),
];
