import { formatBytes, formatRange, hex } from '../../format.ts';
import { GUEST_MEMFD_FLAG_MMAP, KVM_MEMORY_ATTRIBUTE_PRIVATE } from '../../uapi.ts';
import { SET_MEMORY_ATTRIBUTES2_FLAGS } from '../../uapi_proposed.ts';
import { hasOtherBits, isAligned, isZero, low32, sumExceeds, toPages, wraps } from '../arguments.ts';
import type { U64 } from '../kernel.ts';
import { conversionAttributes } from '../machine.ts';
import type { FileKind, GuestMemfdFile, Obstacle, SplitProblem } from '../state.ts';
import { type Rule, rule } from './rule.ts';

export interface ConversionRequest {
  readonly offset: U64;
  readonly size: U64;
  readonly attributes: U64;
  readonly flags: U64;
}

export function isToPrivate({ attributes }: ConversionRequest): boolean {
  return (low32(attributes) & KVM_MEMORY_ATTRIBUTE_PRIVATE) !== 0;
}

/** What KVM_SET_MEMORY_ATTRIBUTES2 is answered on a file that is no guest_memfd: an unknown request of its kind. Contract §2.2, §2.5. */
export function notGuestMemfd(kind: FileKind, isArm: boolean): 'EINVAL' | 'ENOTTY' {
  return kind === 'kvm' || kind === 'vcpu' || (kind === 'vm' && isArm) ? 'EINVAL' : 'ENOTTY';
}

/** The pages of a request whose range is in order. */
export function conversionPages(file: GuestMemfdFile, { offset, size }: ConversionRequest): [number, number] {
  const { pageSize } = file.vm.machine;
  const start = toPages(offset, pageSize);
  return [start, start + toPages(size, pageSize)];
}

/** The first page that cannot become what the request asks for. Nothing is in the way of pages that are so already. */
export function conversionObstacle(file: GuestMemfdFile, request: ConversionRequest): Obstacle | null {
  if (!isToPrivate(request)) return null;
  const [start, end] = conversionPages(file, request);
  for (const part of file.changing(start, end, true)) {
    const obstacle = file.obstacle(part.start, part.end);
    if (obstacle) return obstacle;
  }
  return null;
}

function splitProblem(file: GuestMemfdFile, request: ConversionRequest): SplitProblem | null {
  const [start, end] = conversionPages(file, request);
  for (const part of file.changing(start, end, isToPrivate(request))) {
    const problem = file.splitProblem(part.start, part.end);
    if (problem) return problem;
  }
  return null;
}

const blockedBy = (kind: Obstacle['kind']) => (file: GuestMemfdFile, request: ConversionRequest) => {
  const obstacle = conversionObstacle(file, request);
  return (
    obstacle?.kind === kind &&
    `the page at offset ${hex(obstacle.page * file.vm.machine.pageSize)} ${obstacle.sentence}, so it cannot become private`
  );
};

/** KVM_SET_MEMORY_ATTRIBUTES2 on a guest_memfd, as it is proposed: nothing changes before every rule has been asked. */
export const conversionRules: readonly Rule<GuestMemfdFile, ConversionRequest>[] = [
  rule(
    'ENOTTY',
    'conversion-built',
    ({ vm }) =>
      !vm.machine.proposals.has('in-place-conversion') &&
      'this kernel cannot convert pages in place: a guest_memfd has no KVM_SET_MEMORY_ATTRIBUTES2',
  ),
  rule('EINVAL', 'conversion-flags', (_file, { flags }) => {
    if (hasOtherBits(flags, SET_MEMORY_ATTRIBUTES2_FLAGS))
      return `flags ${hex(flags)} are not content modes: 1 is zero, 2 is preserve`;
    return flags === SET_MEMORY_ATTRIBUTES2_FLAGS && 'content cannot be both zeroed and preserved';
  }),
  rule('EINVAL', 'conversion-attributes', ({ vm }, { attributes }) => {
    if (!hasOtherBits(attributes, conversionAttributes(vm.machine, vm))) return false;
    return vm.hasPrivate || vm.isProtected
      ? `attributes ${hex(attributes)} are not 0 or 8 (private)`
      : 'this VM type has no private memory';
  }),
  rule('EINVAL', 'conversion-range', (_file, { offset, size }) => {
    return (isZero(size) || wraps(offset, size)) && `range ${formatRange(offset, size)} is empty or wraps`;
  }),
  rule('EINVAL', 'conversion-alignment', ({ vm }, { offset, size }) => {
    const { pageSize } = vm.machine;
    const aligned = isAligned(offset, pageSize) && isAligned(size, pageSize);
    return !aligned && `range ${formatRange(offset, size)} is not made of whole pages of ${pageSize} bytes`;
  }),
  rule('EINVAL', 'conversion-end', (file, { offset, size }) => {
    return (
      sumExceeds(offset, size, file.size) &&
      `range ${formatRange(offset, size)} ends past the end of the file, ${formatBytes(file.size)}`
    );
  }),
  rule(
    'EOPNOTSUPP',
    'conversion-mappable',
    ({ flags }) =>
      !(flags & GUEST_MEMFD_FLAG_MMAP) &&
      'the guest_memfd was created without MMAP: nobody could reach its shared pages, and the attribute of its VM decides',
  ),
  rule('EBUSY', 'conversion-movable', blockedBy('movable')),
  rule('EAGAIN', 'conversion-reference', blockedBy('reference')),
  rule(
    (file, request) => splitProblem(file, request)?.errno ?? 'ENOMEM',
    'conversion-split',
    (file, request) => splitProblem(file, request)?.sentence,
  ),
];
