// Conversions as transactions: users of guest memory are asked, hold, veto and are told, and a step that fails leaves no trace.
import { setTimeout as wait } from 'node:timers/promises';
import t, { type Test } from 'tap';
import {
  type ConversionNotice,
  type ConversionReport,
  type ConvertOptions,
  type GuestMemfd,
  type GuestRange,
  type HostMemory,
  KvmError,
  type MemoryUser,
  type Visibility,
  type Vm,
} from '../lib/index.ts';
import { everywhere, refused, rejection, withPrivate } from './backends.ts';
import { FailingKernel } from './failing_kernel.ts';
import { onSoftware } from './pace.ts';

interface Pair {
  readonly vm: Vm;
  readonly P: number;
  readonly memory: HostMemory;
  readonly file: GuestMemfd;
  convert(page: number, pages: number, to: Visibility, options?: ConvertOptions): ReturnType<Vm['convert']>;
}

async function withPair(
  title: string,
  run: (t: Test, pair: Pair) => Promise<void>,
  ways: readonly ('convert' | 'convertSync')[] = ['convert', 'convertSync'],
): Promise<void> {
  for (const way of ways) {
    await withPrivate(t, `${title}: ${way}`, async (t, { vm, P, host, closed }) => {
      const [memory, file] = [host(16), closed(16)];
      vm.createMemslot({ slot: 0, address: 0, size: 16 * P, hostMemory: memory, guestMemfd: file });
      const convert: Pair['convert'] = async (page, pages, to, options) =>
        vm[way]({ address: page * P, size: pages * P }, to, options);
      await run(t, { vm, P, memory, file, convert });
    });
  }
}

/** A user that writes down what it hears. */
function listener(vm: Vm, name: string, heard: string[], veto: () => string | undefined = () => undefined): MemoryUser {
  const { pageSize } = vm.kvm;
  const note = (what: string, { ranges, to }: ConversionNotice): void => {
    const pages = ranges.map(({ address, size }) => `${address / pageSize}+${size / pageSize}`).join(' ');
    heard.push(`${name} ${what} ${pages} ${to}, now ${vm.attributes.state(ranges[0] as never)}`);
  };
  return vm.addMemoryUser({
    name,
    converting: (notice) => {
      note('converting', notice);
      return veto();
    },
    converted: (notice) => note('converted', notice),
    kept: (notice) => note('kept', notice),
  });
}

await withPair('seed 1.11: users are asked before the kernel, and told afterwards', async (t, { vm, convert }) => {
  const heard: string[] = [];
  listener(vm, 'a', heard);
  const b = listener(vm, 'b', heard);
  await convert(2, 4, 'private');
  t.same(heard.splice(0), [
    'a converting 2+4 private, now shared',
    'b converting 2+4 private, now shared',
    'a converted 2+4 private, now private',
    'b converted 2+4 private, now private',
  ]);
  await convert(2, 4, 'private');
  t.same(heard, [], 'nobody is asked when nothing changes');
  b.remove();
  b.remove();
  await convert(0, 8, 'private');
  t.same(heard.splice(0), ['a converting 0+2 6+2 private, now shared', 'a converted 0+2 6+2 private, now private']);
});

await withPair('seed 1.11: a device may veto, and then nothing has changed', async (t, { vm, P, memory, convert }) => {
  const heard: string[] = [];
  memory.bytes().fill(7);
  let reason: string | undefined = 'DMA is at work';
  listener(vm, 'first', heard);
  listener(vm, 'vfio', heard, () => reason);
  listener(vm, 'last', heard);
  const error = await rejection(convert(2, 4, 'private'));
  t.match(error, { name: 'KvmError', code: 'EAGAIN', errno: -11, args: { holders: ['vfio'] } });
  t.match(error.message, /'vfio' does not let .* become private: DMA is at work/);
  t.same(heard.splice(0), [
    'first converting 2+4 private, now shared',
    'vfio converting 2+4 private, now shared',
    'vfio kept 2+4 private, now shared',
    'first kept 2+4 private, now shared',
  ]);
  t.equal(vm.attributes.privateBytes, 0);
  t.ok(memory.bytes().every((byte) => byte === 7));
  reason = undefined;
  t.equal((await convert(2, 4, 'private')).freedBytes, 4 * P);
});

await withPair('seed 1.11: what a device holds stays on its side until it is released', async (t, pair) => {
  const { vm, P, convert } = pair;
  const device = vm.addMemoryUser({ name: 'nvme' });
  const other = vm.addMemoryUser({ name: 'vhost' });
  const hold = device.hold({ address: 3 * P + 10, size: 5 });
  const second = other.hold({ address: 3 * P, size: 2 * P });
  t.same(hold.range, { address: 3 * P + 10, size: 5 });
  t.equal(hold.visibility, 'shared');
  t.same(device.holds, [hold]);
  const error = await rejection(convert(0, 16, 'private'));
  t.match(error, { code: 'EAGAIN', errorOffset: 3 * P, args: { holders: ['vhost', 'nvme'] } });
  t.match(error.message, /held from 0x\w+ on by vhost and nvme/);
  second.release();
  t.match(await rejection(convert(0, 16, 'private')), { errorOffset: 3 * P + 10, args: { holders: ['nvme'] } });
  await convert(4, 12, 'private');
  hold[Symbol.dispose]();
  hold.release();
  t.same(device.holds, []);
  await convert(0, 16, 'private');
  using secret = device.hold({ address: 8 * P, size: P });
  t.equal(secret.visibility, 'private', 'a device may hold private memory');
  t.match(await rejection(convert(8, 1, 'shared')), { code: 'EAGAIN', errorOffset: 8 * P });
  t.equal(vm.attributes.at(8 * P), 'private');
});

await withPair('a device takes its hold back when it is asked', async (t, { vm, P, convert }) => {
  const range = { address: 2 * P, size: P };
  const device: MemoryUser = vm.addMemoryUser({
    name: 'nvme',
    converting: () => {
      for (const hold of device.holds) hold.release();
      return undefined;
    },
    // As QEMU's listener does: map what has become visible, or what is back.
    converted: ({ to }) => void (to === 'shared' && device.hold(range)),
    kept: () => void device.hold(range),
  });
  device.hold(range);
  await convert(0, 4, 'private');
  t.equal(device.holds.length, 0);
  await convert(0, 4, 'shared');
  t.equal(device.holds.length, 1, 'and may hold again when it is told');
  const spoiler = vm.addMemoryUser({ name: 'spoiler', converting: () => 'no' });
  await rejection(convert(0, 4, 'private'));
  t.equal(device.holds.length, 1, 'or when it comes to nothing');
  spoiler.remove();
});

await withPair(
  'what a conversion waits for may still be held',
  async (t, { vm, P, convert }) => {
    const range = { address: 0, size: 2 * P };
    let taken = 0;
    const device = vm.addMemoryUser({
      name: 'nvme',
      converting: () => {
        taken += device.holds.length;
        for (const hold of device.holds) hold.release();
        return undefined;
      },
      converted: ({ to }) => void (to === 'shared' && device.hold(range)),
    });
    const reports = await Promise.all([convert(0, 2, 'private'), convert(0, 2, 'shared'), convert(0, 2, 'private')]);
    t.same(
      reports.map(({ complaints }) => complaints),
      [undefined, undefined, undefined],
    );
    t.equal(taken, 1, 'and it is asked for it');
  },
  ['convert'],
);

await withPair('users that throw', async (t, { vm, convert }) => {
  const heard: string[] = [];
  listener(vm, 'a', heard);
  const broken = vm.addMemoryUser({
    name: 'broken',
    converting: () => {
      throw new RangeError('in converting');
    },
  });
  await t.rejects(convert(0, 1, 'private'), { name: 'RangeError', message: 'in converting' });
  t.same(heard.splice(0), ['a converting 0+1 private, now shared', 'a kept 0+1 private, now shared']);
  broken.remove();
  vm.addMemoryUser({
    name: 'late',
    converted: () => {
      throw new RangeError('in converted');
    },
  });
  const { complaints, changed } = await convert(0, 1, 'private');
  t.equal(changed.length, 1, 'it has taken place');
  t.match(complaints, [{ user: 'late', error: { message: 'in converted' } }]);
});

await withPair(
  'a user that takes its time',
  async (t, { vm, P, convert }) => {
    let veto: string | undefined;
    const user = vm.addMemoryUser({
      name: 'slow',
      converting: async () => {
        await wait(5);
        return veto;
      },
    });
    const report = convert(0, 4, 'private');
    await wait(1);
    t.match(await rejection((async () => user.hold({ address: P, size: P }))()), { code: 'EBUSY' });
    t.equal((await report).changed.length, 1);
    const late = await rejection((async () => vm.convertSync({ address: 0, size: P }, 'shared'))());
    t.match(late, { code: 'EAGAIN', message: /only convert\(\) waits for/ });
    veto = 'still no';
    t.match(await rejection(convert(0, 4, 'shared')), { code: 'EAGAIN', message: /still no/ });
    veto = undefined;
    const abort = new AbortController();
    const aborted = convert(0, 4, 'shared', { signal: abort.signal });
    abort.abort(new Error('enough'));
    await t.rejects(aborted, { message: 'enough' });
    t.equal(vm.attributes.state({ address: 0, size: 4 * P }), 'private');
  },
  ['convert'],
);

await withPair(
  'seed 1.3: a conversion that tries again works once the pin is let go',
  async (t, { vm, P, file, convert }) => {
    const pin = file.pin({ offset: 5 * P, size: P }, 'a DMA engine');
    const error = await rejection(convert(0, 8, 'private'));
    t.match(error, { code: 'EAGAIN', errorOffset: 5 * P, args: { holders: ['a DMA engine'] } });
    t.match(await rejection(convert(0, 8, 'private', { retries: 2 })), { code: 'EAGAIN' });
    const waiting = convert(0, 8, 'private', { retries: 50 });
    const behind = convert(0, 8, 'shared');
    await wait(30);
    t.equal(vm.attributes.privateBytes, 0);
    pin[Symbol.dispose]();
    t.equal((await waiting).changed.length, 1);
    t.equal((await behind).changed.length, 1, 'the next one of the same memory comes after it');
    const again = file.pin({ offset: 0, size: P });
    const abort = new AbortController();
    const aborted = convert(0, 8, 'private', { retries: 1000, signal: abort.signal });
    setTimeout(() => abort.abort(new Error('enough')), 20);
    await t.rejects(aborted, { message: 'enough' });
    again[Symbol.dispose]();
    for (const retries of [-1, 0.5, Number.NaN])
      t.match(await rejection(convert(0, 1, 'private', { retries })), { code: 'ERR_OUT_OF_RANGE' });
  },
  ['convert'],
);

await withPair(
  'conversions of the same memory are ordered, of other memory they are not',
  async (t, { vm, convert }) => {
    const order: string[] = [];
    let open = (): void => {};
    const gate = new Promise<void>((resolve) => {
      open = resolve;
    });
    vm.addMemoryUser({
      name: 'gate',
      converting: async ({ ranges }) => (ranges[0]?.address === 0 ? void (await gate) : undefined),
    });
    const note = (name: string) => () => void order.push(name);
    const all = [
      convert(0, 4, 'private').then(note('0+4 private')),
      convert(2, 4, 'shared').then(note('2+4 shared')),
      convert(8, 4, 'private').then(note('8+4 private')),
      convert(10, 1, 'shared').then(note('10+1 shared')),
    ];
    await Promise.all(all.slice(2));
    t.same(order, ['8+4 private', '10+1 shared']);
    open();
    await Promise.all(all);
    t.same(order.slice(2), ['0+4 private', '2+4 shared']);
  },
  ['convert'],
);

await withPair('seed 0.10: users hear of a punch before pages go', async (t, { vm, P, memory, file, convert }) => {
  const heard: string[] = [];
  let problem: Error | undefined;
  const pages = (ranges: readonly GuestRange[]) => ranges.map(({ address, size }) => `${address / P}+${size / P}`);
  const user = vm.addMemoryUser({
    name: 'device',
    discarding: (ranges) => {
      heard.push(
        `${pages(ranges).join(' ')}: ${file.residentBytes() / P} private, ${memory.residentBytes() / P} shared`,
      );
      if (problem) throw problem;
    },
  });
  await convert(4, 4, 'private');
  await convert(10, 2, 'private');
  file.allocate();
  memory.bytes().fill(1);
  t.same(heard, [], 'a conversion asks instead');
  file.punchHole({ offset: 5 * P, size: 6 * P });
  t.same(heard.splice(0), ['5+3 10+1: 16 private, 16 shared'], 'what the guest sees of them, and they are still there');
  file.punchHole({ offset: 0, size: 4 * P });
  t.same(heard, [], 'the guest has other memory there');
  memory.discard({ offset: 0, size: 5 * P });
  t.same(heard.splice(0), ['0+4: 6 private, 16 shared']);
  problem = new Error('DMA is at work');
  const thrown = (await rejection((async () => file.punchHole())())) as Error;
  t.equal(thrown, problem);
  await t.rejects((async () => memory.discard({ offset: 0, size: 16 * P }))(), problem);
  t.same([file.residentBytes(), memory.residentBytes()], [6 * P, 11 * P], 'and nothing has gone');
  heard.length = 0;
  t.equal((await rejection((async () => file.punchHole({ offset: 1, size: P }))())).code, 'EINVAL');
  t.same(heard, [], 'what is refused anyway is nobody’s business');
  user.remove();
  file.punchHole();
  t.equal(file.residentBytes(), 0);
});

await everywhere(t, 'seed 0.10: of a file that the host sees too, and of plain memory', async (t, world) => {
  const { vm, P, host, shared, backend } = world;
  const plain = host(4);
  vm.createMemslot({ address: 0, size: 2 * P, hostMemory: plain });
  vm.createMemslot({ address: 8 * P, size: 2 * P, hostMemory: plain });
  const heard: GuestRange[] = [];
  vm.addMemoryUser({ name: 'device', discarding: (ranges) => void heard.push(...ranges) });
  plain.discard({ offset: P, size: 2 * P });
  t.same(heard.splice(0), [
    { address: P, size: P },
    { address: 9 * P, size: P },
  ]);
  if (vm.capabilities.guestMemfdInitShared) {
    const file = shared(4);
    vm.createMemslot({ address: 16 * P, size: 2 * P, guestMemfd: file, guestMemfdOffset: 2 * P });
    file.punchHole();
    t.same(heard, [{ address: 16 * P, size: 2 * P }], backend.name);
    vm.addMemoryUser({ name: 'rude', discarding: () => vm.close() });
    refused(t, () => file.punchHole(), 'ERR_CLOSED');
  }
});

await everywhere(t, 'who may hold what', async (t, { vm, kvm, P, host }) => {
  vm.createMemslot({ address: 0, size: 2 * P, hostMemory: host(4) });
  vm.createMemslot({ address: 2 * P, size: 2 * P, hostMemory: host(2) });
  const user = vm.addMemoryUser({ name: 'device' });
  t.equal(user.name, 'device');
  user.hold({ address: P, size: 2 * P }).release();
  refused(t, () => user.hold({ address: P, size: 4 * P }), 'EFAULT', 'no memslot');
  refused(t, () => user.hold({ address: -1, size: 1 }), 'ERR_OUT_OF_RANGE');
  refused(t, () => user.hold(undefined as never), 'ERR_INVALID_ARG_TYPE');
  refused(t, () => vm.addMemoryUser({} as never), 'ERR_INVALID_ARG_TYPE');
  refused(t, () => vm.addMemoryUser({ name: 'a', kept: 1 as never }), 'ERR_INVALID_ARG_TYPE');
  const hold = user.hold({ address: 0, size: P });
  user.remove();
  t.same(user.holds, []);
  hold.release();
  refused(t, () => user.hold({ address: 0, size: P }), 'ERR_CLOSED', 'device');
  const other = kvm.createVm();
  other.close();
  refused(t, () => other.addMemoryUser({ name: 'late' }), 'ERR_CLOSED');
  t.throws(() => new (user.constructor as new () => object)(), { code: 'ERR_INVALID_ARG_TYPE' });
});

// ── failures, one step at a time

const P = 4096;

interface World {
  readonly failing: FailingKernel;
  readonly vm: Vm;
  readonly memory: HostMemory;
  readonly file: GuestMemfd;
  readonly heard: string[];
  state(): { readonly attributes: unknown };
}

/** Where the two sides are: two memories; one file, by the VM's attribute; one file, in place; or half of each. */
const kinds = ['two memories', 'one file', 'in place', 'in place beside two memories'] as const;
type Kind = (typeof kinds)[number];

/** Two slots, some of it private already, both sides with memory in them. */
function world(kind: Kind, from: Visibility): World {
  const inPlace = kind.startsWith('in place');
  const failing = new FailingKernel(inPlace ? { proposals: ['in-place-conversion'] } : undefined);
  const { kvm } = failing;
  const vm = kvm.createVm({ type: 'sw-protected' });
  const [memory, file] = [kvm.createHostMemory({ size: 16 * P }), vm.createGuestMemfd({ size: 16 * P })];
  const one = vm.createGuestMemfd({ size: 16 * P, mmap: true, initShared: inPlace });
  const slot = (page: number, isOne: boolean): unknown =>
    vm.createMemslot({
      address: page * P,
      size: 8 * P,
      guestMemfdOffset: page * P,
      guestMemfd: isOne ? one : file,
      ...(!isOne && { hostMemory: memory, hostOffset: page * P }),
    });
  slot(0, kind !== 'two memories');
  slot(8, kind === 'one file' || kind === 'in place');
  if (from === 'private') vm.convertSync({ address: 0, size: 16 * P }, 'private');
  vm.convertSync({ address: 5 * P, size: 2 * P }, from === 'private' ? 'shared' : 'private');
  memory.bytes().forEach((_, index, all) => {
    all[index] = index / P + 1;
  });
  file.allocate();
  one.allocate();
  for (const { address, size } of inPlace ? vm.attributes.rangesOf('shared', { address: 0, size: 8 * P }) : [])
    vm.memory.write(address, new Uint8Array(size).fill(9));
  const heard: string[] = [];
  listener(vm, 'device', heard);
  const { calls } = failing;
  calls.length = 0;
  const state = () => {
    const now = {
      attributes: [...vm.attributes],
      bytes: Array.from({ length: 16 }, (_, page) => memory.bytes()[page * P]),
      guest: inPlace
        ? vm.attributes
            .rangesOf('shared', { address: 0, size: 8 * P })
            .map(({ address }) => vm.memory.read(address, 1)[0])
        : [],
      resident: [memory, file, one].map((each) => each.residentBytes()),
    };
    return now;
  };
  return { failing, vm, memory, file, heard, state };
}

if (onSoftware)
  t.test('a failure at any step leaves all as it was', async (t) => {
    const range = { address: 2 * P, size: 12 * P };
    const named = new Set<string>();
    for (const kind of kinds) {
      for (const way of ['convert', 'convertSync'] as const) {
        for (const to of ['private', 'shared'] as const) {
          for (const content of ['unspecified', 'zero', 'preserve'] as const) {
            // Two memories cannot preserve.
            if (content === 'preserve' && !/^(one file|in place)$/.test(kind)) continue;
            const options = { chunkSize: 2 * P, content };
            const from = to === 'private' ? 'shared' : 'private';
            const whole = world(kind, from);
            await (async () => whole.vm[way](range, to, options))();
            const calls = [...whole.failing.calls];
            const after = whole.state();
            t.ok(calls.length > 4);
            for (const [index, name] of calls.entries()) {
              const { failing, vm, heard, state } = world(kind, from);
              const before = state();
              failing.calls.length = 0;
              failing.failAt = index;
              const title = `${kind}, ${way} to ${to}, content ${content}: step ${index}, ${name}, fails`;
              const outcome = await (async () => vm[way](range, to, options))().catch((error: unknown) => error);
              failing.failAt = -1;
              named.add(name);
              if (outcome instanceof KvmError) {
                t.equal(outcome.code, 'ENOMEM', title);
                // What was to be zeroed nobody keeps.
                if (content === 'zero') t.same(state().attributes, before.attributes, title);
                else t.same(state(), before, `${title}: all is as it was`);
                t.equal(heard.at(-1)?.split(' ')[1], 'kept');
              } else {
                const { undiscarded, freedBytes } = outcome as ConversionReport;
                const counted = /cachestat|mincore/.test(name);
                t.equal(
                  undiscarded?.length ?? 0,
                  counted ? 0 : 1,
                  `${title}: it has taken place, and says what is held twice`,
                );
                t.same(state().attributes, after.attributes);
                if (counted) t.same(state(), after, `${title}: all is given back, if not counted`);
                t.ok(freedBytes >= 0);
                t.equal(heard.at(-1)?.split(' ')[1], 'converted');
              }
              failing.kvm.close();
            }
            whole.failing.kvm.close();
          }
        }
      }
    }
    t.same([...named].sort(), [
      'cachestat',
      'fallocate',
      'madvise',
      'mincore',
      'setMemoryAttributes',
      'setMemoryAttributes2',
    ]);
  });

t.test('a kernel that refuses to go back is an error of its own', async (t) => {
  const { failing, vm } = world('two memories', 'shared');
  failing.failAt = 3;
  failing.forEver = true;
  const error = await rejection(vm.convert({ address: 0, size: 16 * P }, 'private', { chunkSize: 2 * P }));
  t.match(error, { code: 'EIO', message: /could not be undone/ });
  failing.kvm.close();
});
