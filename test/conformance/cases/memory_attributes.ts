import { KVM_SET_MEMORY_ATTRIBUTES } from '../../../lib/uapi.ts';
import { attributes, noAttributes, swProtected } from '../needs.ts';
import { type Scenario, scenario, section, U64_END } from '../scenario.ts';

const PRIVATE = 8;
const privateVm = (s: Scenario) => s.vm(1);
const set = (s: Scenario, vm: number, from: number, pages: number, value = PRIVATE) =>
  s.setAttributes(vm, from * s.P, pages * s.P, value);
/** The page that ends `pages` below 2^64. */
const top = (s: Scenario, pages: number) => U64_END - BigInt(pages * s.P);

export const memoryAttributes = section('Memory attributes', [
  scenario(168, 'not built: an unknown request, whatever the arguments', {
    needs: [noAttributes],
    given: (s) => s.vm(),
    when: (s, vm) => [s.setAttributes(vm, 0, s.P, 0), s.setAttributes(vm, 1, 0, PRIVATE, 1)],
    expect: { x86_64: ['ENOTTY', 'ENOTTY'], aarch64: ['EINVAL', 'EINVAL'] },
  }),
  scenario(169, 'a NULL pointer is EFAULT', {
    needs: [attributes],
    given: (s) => s.vm(),
    when: (s, vm) => s.kernel.ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, 0),
    expect: 'EFAULT',
  }),
  scenario(170, 'a default VM accepts attributes 0 and rejects PRIVATE', {
    needs: [attributes],
    given: (s) => s.vm(),
    when: (s, vm) => [set(s, vm, 0, 1, 0), set(s, vm, 0, 1, PRIVATE), s.privateRanges(vm)],
    expect: [0, 'EINVAL', []],
  }),
  scenario('12 default', 'a default VM still checks the range of its no-op', {
    needs: [attributes],
    given: (s) => s.vm(),
    when: (s, vm) => [
      s.setAttributes(vm, 0, 0, 0),
      s.setAttributes(vm, 1, s.P, 0),
      s.setAttributes(vm, 0, 1, 0),
      s.setAttributes(vm, top(s, 1), s.P, 0),
      s.setAttributes(vm, 0, s.P, 0, 1),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(171, 'any bit but PRIVATE is EINVAL, and so are flags', {
    needs: [swProtected],
    given: privateVm,
    when: (s, vm) => [
      ...[1, 2, 4, 16, 9, 1n << 63n].map((value) => s.setAttributes(vm, 0, s.P, value)),
      s.setAttributes(vm, 0, s.P, PRIVATE, 1),
      s.setAttributes(vm, 0, s.P, 0, 1n << 63n),
    ],
    expect: Array(8).fill('EINVAL'),
  }),
  scenario(172, 'an empty or unaligned range is EINVAL', {
    needs: [swProtected],
    given: privateVm,
    when: (s, vm) => [
      s.setAttributes(vm, 0, 0),
      s.setAttributes(vm, 1, s.P),
      s.setAttributes(vm, 0, 1),
      s.setAttributes(vm, s.P / 2, s.P),
      s.setAttributes(vm, 0, s.P + 1),
      s.privateRanges(vm),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', []],
  }),
  scenario(173, 'a range that ends at 2^64 or wraps is EINVAL', {
    needs: [swProtected],
    given: privateVm,
    when: (s, vm) => [
      s.setAttributes(vm, top(s, 1), s.P),
      s.setAttributes(vm, top(s, 1), 2 * s.P),
      s.setAttributes(vm, s.P, top(s, 1)),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(174, 'the highest usable page ends one page below 2^64', {
    needs: [swProtected],
    given: privateVm,
    when: (s, vm) => [s.setAttributes(vm, top(s, 2), s.P), s.setAttributes(vm, top(s, 2), s.P, 0), s.privateRanges(vm)],
    expect: [0, 0, []],
  }),
  scenario(175, 'memory that no slot describes can be private, and be set twice', {
    needs: [swProtected],
    given: privateVm,
    when: (s, vm) => [set(s, vm, 16, 4), set(s, vm, 16, 4), s.privateRanges(vm)],
    expect: [0, 0, [[16, 20]]],
  }),
  scenario(176, 'a range half inside a slot is set wholly', {
    needs: [swProtected],
    given: privateVm,
    when: (s, vm) => [s.slot(vm, { pages: 4 }), set(s, vm, 2, 4), s.privateRanges(vm)],
    expect: [0, 0, [[2, 6]]],
  }),
  scenario(177, 'memory above the guest’s physical limit can be private', {
    needs: [swProtected],
    given: privateVm,
    when: (s, vm) => [
      s.setAttributes(vm, 1n << 52n, s.P),
      s.setAttributes(vm, 1n << 62n, s.P),
      s.setAttributes(vm, 1n << 52n, s.P, 0),
    ],
    expect: [0, 0, 0],
  }),
  scenario(178, 'clearing 1 PiB with nothing set is immediate', {
    needs: [swProtected],
    given: privateVm,
    when: (s, vm) => {
      const start = performance.now();
      return [s.setAttributes(vm, 0, 1n << 50n, 0), performance.now() - start < 1000, s.privateRanges(vm)];
    },
    expect: [0, true, []],
  }),
  scenario(180, 'deleting and creating slots does not change attributes', {
    needs: [swProtected],
    given: privateVm,
    when: (s, vm) => [
      s.bind(vm, { pages: 4, file: s.gmem(vm, 4) }),
      set(s, vm, 1, 2),
      s.remove(vm, 0),
      s.privateRanges(vm),
      s.slot(vm, { pages: 8 }),
      s.privateRanges(vm),
    ],
    expect: [0, 0, 0, [[1, 3]], 0, [[1, 3]]],
  }),
  scenario('12 no gmem', 'it does not ask whether the slot has a guest_memfd', {
    needs: [swProtected],
    given: privateVm,
    when: (s, vm) => [s.slot(vm, { pages: 4 }), set(s, vm, 0, 4), s.privateRanges(vm)],
    expect: [0, 0, [[0, 4]]],
  }),
  scenario('12 split', 'making the middle shared leaves both ends private', {
    needs: [swProtected],
    given: privateVm,
    when: (s, vm) => [
      set(s, vm, 0, 8),
      set(s, vm, 2, 3, 0),
      s.privateRanges(vm),
      set(s, vm, 2, 3),
      s.privateRanges(vm),
    ],
    expect: [
      0,
      0,
      [
        [0, 2],
        [5, 8],
      ],
      0,
      [[0, 8]],
    ],
  }),
  scenario('12 all or nothing', 'a refused request changes nothing', {
    needs: [swProtected],
    given: privateVm,
    when: (s, vm) => [
      set(s, vm, 0, 4),
      s.setAttributes(vm, 0, 2 * s.P, 0, 1),
      s.setAttributes(vm, 0, s.P + 1, 0),
      s.setAttributes(vm, 0, s.P, 1),
      s.privateRanges(vm),
    ],
    expect: [0, 'EINVAL', 'EINVAL', 'EINVAL', [[0, 4]]],
  }),
  scenario('12 per VM', 'each VM has attributes of its own', {
    needs: [swProtected],
    given: (s) => ({ a: s.vm(1), b: s.vm(1) }),
    when: (s, { a, b }) => [set(s, a, 0, 4), s.privateRanges(a), s.privateRanges(b)],
    expect: [0, [[0, 4]], []],
  }),
  scenario('12 keeps data', 'a change of attributes frees nothing of the file', {
    needs: [swProtected],
    given: (s) => {
      const vm = privateVm(s);
      return { vm, file: s.gmem(vm, 4) };
    },
    when: (s, { vm, file }) => [
      s.bind(vm, { pages: 4, file }),
      s.fallocate(file, 1, 0, 4),
      set(s, vm, 0, 4),
      set(s, vm, 0, 4, 0),
      s.cached(file),
    ],
    expect: [0, 0, 0, 0, 4],
  }),
]);
