// vm.convert() where the kernel converts in place: one file, whose pages are private or shared by a state of its own.
import fc from 'fast-check';
import t, { type Test } from 'tap';
import {
  ConversionPolicy,
  GuestAgent,
  type GuestMemfd,
  Kvm,
  MiB,
  type Proposal,
  type Visibility,
  type Vm,
} from '../lib/index.ts';
import type { SoftwareKernel } from '../lib/kernel/software/software_kernel.ts';
import { errorOf, refused, rejection } from './backends.ts';

const P = 4096;
const PAGES = 16;

interface World {
  readonly kvm: Kvm;
  readonly vm: Vm;
  readonly file: GuestMemfd;
  convert(page: number, pages: number, to: Visibility, content?: 'zero' | 'preserve'): ReturnType<Vm['convert']>;
  put(page: number, byte: number): void;
  get(page: number): number | undefined;
}

function world(t: Test, proposals: readonly Proposal[] = ['in-place-conversion'], initShared = true): World {
  const kvm = Kvm.open({ backend: 'software', model: { proposals } });
  t.teardown(() => kvm.close());
  const vm = kvm.createVm({ type: 'sw-protected' });
  const file = vm.createGuestMemfd({ size: PAGES * P, mmap: true, initShared });
  vm.createMemslot({ slot: 0, address: 0, size: PAGES * P, guestMemfd: file });
  return {
    kvm,
    vm,
    file,
    convert: (page, pages, to, content) =>
      vm.convert({ address: page * P, size: pages * P }, to, { chunkSize: 4 * P, ...(content && { content }) }),
    put: (page, byte) => vm.memory.write(page * P, Uint8Array.of(byte)),
    get: (page) => vm.memory.read(page * P, 1)[0],
  };
}
const kernelOf = (vm: Vm): SoftwareKernel => vm.backing.kernel as SoftwareKernel;

t.test('seed 1.1: shared and private parts of one file, converted in place', async (t) => {
  const { vm, file, convert, put, get } = world(t);
  t.equal(vm.capabilities.conversion, 'in-place');
  t.equal(vm.capabilities.evidence.conversion, 'probed');
  for (let page = 0; page < PAGES; page++) put(page, page + 1);
  const report = await convert(4, 8, 'private');
  t.match(report, { changed: [{ address: 4 * P, size: 8 * P }], freedBytes: 0, conversion: 'in-place' });
  t.equal(vm.attributes.state({ address: 0, size: PAGES * P }), 'mixed');
  t.same(vm.attributes.privateRanges(), [{ address: 4 * P, size: 8 * P }]);
  t.equal(file.residentBytes(), PAGES * P, 'one memory for both sides');
  t.equal(get(3), 4);
  refused(t, () => vm.memory.read(3 * P, 2 * P), 'EFAULT', 'private');
  refused(t, () => file.bytes({ offset: 4 * P, size: 1 }), 'EFAULT');
  t.equal(file.bytes({ offset: 0, size: P })[0], 1);
  await convert(0, PAGES, 'shared', 'preserve');
  t.same(vm.attributes.privateRanges(), []);
  t.equal(get(7), 8, 'seed 1.6: and the content is there');
});

t.test('a file that begins private, and slots that come and go', async (t) => {
  const { vm, file, convert } = world(t, ['in-place-conversion'], false);
  t.equal(vm.attributes.state({ address: 0, size: PAGES * P }), 'private');
  await convert(2, 2, 'shared');
  vm.memslots.get(0)?.remove();
  t.same(vm.attributes.privateRanges(), [], 'the state is the file’s');
  vm.createMemslot({ address: 64 * P, size: 8 * P, guestMemfd: file, guestMemfdOffset: P });
  t.same(vm.attributes.privateRanges(), [
    { address: 64 * P, size: P },
    { address: 67 * P, size: 5 * P },
  ]);
  vm.memory.write(65 * P, Uint8Array.of(1));
  refused(t, () => vm.memory.write(64 * P, Uint8Array.of(1)), 'EFAULT');
});

t.test('seed 1.3: a page that somebody else has is in the way, and nothing has changed', async (t) => {
  const { vm, file, convert, put, get } = world(t);
  for (let page = 0; page < PAGES; page++) put(page, page + 1);
  const view = vm.memory.view(2 * P, 2 * P);
  t.equal(view[0], 3);
  const release = kernelOf(vm).pinPages(file.fd, 9 * P, P);
  if (typeof release === 'number') throw new Error('no pin');
  const error = await rejection(convert(0, 12, 'private'));
  t.match(error, { code: 'EAGAIN', errorOffset: 9 * P, request: 'KVM_SET_MEMORY_ATTRIBUTES2' });
  t.same(vm.attributes.privateRanges(), []);
  for (let page = 0; page < PAGES; page++) t.equal(get(page), page + 1);
  await convert(0, 9, 'private');
  t.match(await convert(0, 9, 'private'), { changed: [] }, 'seed 1.7: what is as wanted is left alone');
  const again = vm.convert({ address: 0, size: 12 * P }, 'private', { retries: 20 });
  setTimeout(release, 20);
  t.same((await again).changed, [{ address: 9 * P, size: 3 * P }], 'and it works once the page is let go');
  t.equal(view.length, 0, 'our own views and page tables are never in the way');
});

t.test('seed 1.6: kept, or zeroed', async (t) => {
  const { convert, put, get } = world(t);
  put(1, 5);
  put(2, 6);
  t.match(await convert(1, 1, 'private', 'zero'), { contentBy: 'kernel' });
  await convert(1, 1, 'shared', 'preserve');
  t.equal(get(1), 0);
  await convert(2, 1, 'private', 'preserve');
  await convert(2, 1, 'shared', 'preserve');
  t.equal(get(2), 6);
});

t.test('seed 1.8: a punch changes no state', async (t) => {
  const { vm, file, convert } = world(t);
  await convert(0, 4, 'private');
  file.punchHole({ offset: 2 * P, size: 4 * P });
  t.same(vm.attributes.privateRanges(), [{ address: 0, size: 4 * P }]);
});

t.test('beside a pair of memories, each by its own way', async (t) => {
  const { vm, kvm, convert } = world(t);
  const hostMemory = kvm.createHostMemory({ size: 4 * P });
  const guestMemfd = vm.createGuestMemfd({ size: 4 * P });
  vm.createMemslot({ address: PAGES * P, size: 4 * P, hostMemory, guestMemfd });
  hostMemory.bytes().fill(1);
  const { changed, freedBytes } = await convert(12, 8, 'private');
  t.same(changed, [{ address: 12 * P, size: 8 * P }]);
  t.equal(freedBytes, 4 * P, 'the pair gives its shared side back');
  t.equal(vm.attributes.state({ address: 12 * P, size: 8 * P }), 'private');
  vm.setMemoryAttributes({ address: 0, size: 20 * P }, { private: false });
  t.same(
    vm.attributes.privateRanges(),
    [{ address: 12 * P, size: 4 * P }],
    'the VM’s attribute is not the file’s state',
  );
});

t.test('a guest that asks, and the policy that answers', async (t) => {
  const kvm = Kvm.open({ backend: 'software', model: { proposals: ['in-place-conversion'] } });
  t.teardown(() => kvm.close());
  const vm = kvm.createVm({ type: 'sw-protected' });
  const file = vm.createGuestMemfd({ size: 2 * MiB, mmap: true, initShared: true });
  vm.createMemslot({ address: 0, size: 2 * MiB, guestMemfd: file });
  const agent = GuestAgent.boot(vm, { onExit: new ConversionPolicy(vm).handle });
  const range = { address: MiB, size: 4 * P };
  agent.write(range.address, Uint8Array.of(7));
  t.equal(agent.requestConversion(range, 'private'), 0n);
  agent.write(range.address, Uint8Array.of(8));
  t.equal(errorOf(() => vm.memory.read(range.address, 1)).code, 'EFAULT');
  using pin = { release: kernelOf(vm).pinPages(file.fd, MiB + 8 * P, P), [Symbol.dispose]() {} };
  t.equal(agent.requestConversion({ address: MiB + 8 * P, size: P }, 'private'), -11n, 'the guest reads EAGAIN');
  t.ok(pin);
  t.equal(agent.requestConversion(range, 'shared'), 0n);
});

t.test('a policy refuses with an errno, and takes nothing for one that is none', async (t) => {
  const kvm = Kvm.open({ backend: 'software' });
  t.teardown(() => kvm.close());
  const vm = kvm.createVm({ type: 'sw-protected' });
  const file = vm.createGuestMemfd({ size: 2 * MiB });
  vm.createMemslot({
    address: 0,
    size: 2 * MiB,
    guestMemfd: file,
    hostMemory: kvm.createHostMemory({ size: 2 * MiB }),
  });
  let verdict: unknown = false;
  const policy = new ConversionPolicy(vm, { allow: () => verdict as boolean });
  const agent = GuestAgent.boot(vm, { onExit: policy.handle });
  const range = { address: MiB, size: P };
  t.equal(agent.requestConversion(range, 'private'), -22n);
  verdict = 1;
  t.equal(agent.requestConversion(range, 'private'), -1n);
  const ask = { reason: 'map-gpa-range', ...range, to: 'private', reply: () => t.fail('answered') } as const;
  for (verdict of [0, -1, 4096, 1.5, NaN]) t.equal(errorOf(() => policy.handle(ask as never)).code, 'ERR_OUT_OF_RANGE');
  for (verdict of [undefined, null, 'EPERM', 1n])
    t.equal(errorOf(() => policy.handle(ask as never)).code, 'ERR_INVALID_ARG_TYPE');
  t.same(vm.attributes.privateRanges(), []);
  for (const bad of [null, {}, Object.create(kvm)])
    t.equal(errorOf(() => new ConversionPolicy(bad as never)).code, 'ERR_INVALID_ARG_TYPE');
  for (const bad of [null, 5, { allow: 5 }])
    t.equal(errorOf(() => new ConversionPolicy(vm, bad as never)).code, 'ERR_INVALID_ARG_TYPE');
});

t.test('any order of conversions, punches and accesses', async (t) => {
  const step = fc.record({
    do: fc.constantFrom('convert' as const, 'punch' as const, 'write' as const, 'view' as const, 'slot' as const),
    at: fc.integer({ min: 0, max: PAGES - 1 }),
    pages: fc.integer({ min: 1, max: PAGES }),
    to: fc.constantFrom('private' as const, 'shared' as const),
  });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 25 }), (steps) => {
      using kvm = Kvm.open({ backend: 'software', model: { proposals: ['in-place-conversion'] } });
      const vm = kvm.createVm({ type: 'sw-protected' });
      const file = vm.createGuestMemfd({ size: PAGES * P, mmap: true, initShared: true });
      const create = () => vm.createMemslot({ slot: 0, address: 0, size: PAGES * P, guestMemfd: file });
      let slot = create();
      const secret = new Set<number>();
      for (const { do: what, at, pages, to } of steps) {
        const size = Math.min(pages, PAGES - at) * P;
        const range = { address: at * P, size };
        const covered = Array.from({ length: size / P }, (_, index) => at + index);
        if (what === 'convert') {
          const { changed } = vm.convertSync(range, to);
          const expected = covered.filter((page) => secret.has(page) !== (to === 'private')).length * P;
          if (changed.reduce((sum, { size }) => sum + size, 0) !== expected) return false;
          for (const page of covered)
            if (to === 'private') secret.add(page);
            else secret.delete(page);
        } else if (what === 'punch') {
          file.punchHole({ offset: at * P, size });
        } else if (what === 'slot') {
          slot.remove();
          slot = create();
        } else {
          const reachable = covered.every((page) => !secret.has(page));
          const access = () =>
            what === 'write' ? vm.memory.write(at * P, new Uint8Array(size).fill(at)) : vm.memory.view(at * P, size);
          const code = ((): string => {
            try {
              access();
              return '';
            } catch (error) {
              return (error as { code: string }).code;
            }
          })();
          if (code !== (reachable ? '' : 'EFAULT')) return false;
        }
        for (let page = 0; page < PAGES; page++)
          if ((vm.attributes.at(page * P) === 'private') !== secret.has(page)) return false;
      }
      return true;
    }),
    { numRuns: Number(process.env.GUEST_MEMFD_RUNS ?? 300) },
  );
  t.pass();
});
