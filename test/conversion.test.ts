import fc from 'fast-check';
import t, { type Test } from 'tap';
import type { MemoryFaultExit } from '../lib/exit.ts';
import {
  ConversionPolicy,
  type ConversionReport,
  type ConvertOptions,
  type GuestMemfd,
  type GuestRange,
  type HostMemory,
  type KvmError,
  type MemoryHold,
  type Visibility,
  type Vm,
} from '../lib/index.ts';
import { errorOf, everywhere, refused, rejection, withPrivate } from './backends.ts';
import { FailingKernel } from './failing_kernel.ts';
import { onSoftware } from './pace.ts';

// Conversions: what they report, that they take place wholly or not at all, and that no byte is held twice afterwards.

/** Runs a test of conversions with convert() and with convertSync(). */
async function bothWays(
  title: string,
  run: (t: Test, convert: Convert, world: Pair) => void | Promise<void>,
): Promise<void> {
  for (const way of ['convert', 'convertSync'] as const) {
    await withPrivate(t, `${title}: ${way}`, async (t, { vm, P, host, closed }) => {
      const [memory, file] = [host(16), closed(16)];
      vm.createMemslot({ slot: 0, address: 0, size: 16 * P, hostMemory: memory, guestMemfd: file });
      const convert: Convert = async (page, pages, to, options) =>
        vm[way]({ address: page * P, size: pages * P }, to, options);
      await run(t, convert, { vm, memory, file, P, range: (page, pages) => ({ address: page * P, size: pages * P }) });
    });
  }
}
type Convert = (page: number, pages: number, to: Visibility, options?: ConvertOptions) => Promise<ConversionReport>;
interface Pair {
  readonly vm: Vm;
  readonly memory: HostMemory;
  readonly file: GuestMemfd;
  readonly P: number;
  range(page: number, pages: number): GuestRange;
}

await bothWays('the report says what changed', async (t, convert, { vm, memory, file, P, range }) => {
  memory.bytes({ offset: 0, size: 6 * P }).fill(1);
  t.same(await convert(2, 6, 'private'), {
    to: 'private',
    changed: [range(2, 6)],
    unchanged: [],
    freedBytes: 4 * P,
    contentBy: 'none',
    conversion: 'attributes',
  });
  t.equal(memory.residentBytes(), 2 * P);
  file.allocate({ offset: 4 * P, size: 10 * P });
  t.same(await convert(4, 2, 'shared', { content: 'zero' }), {
    to: 'shared',
    changed: [range(4, 2)],
    unchanged: [],
    freedBytes: 2 * P,
    contentBy: 'kernel',
    conversion: 'attributes',
  });
  t.equal(file.residentBytes(), 8 * P);
  t.same(await convert(0, 16, 'private'), {
    to: 'private',
    changed: [range(0, 2), range(4, 2), range(8, 8)],
    unchanged: [range(2, 2), range(6, 2)],
    freedBytes: 2 * P,
    contentBy: 'none',
    conversion: 'attributes',
  });
  t.same(await convert(0, 16, 'private'), {
    to: 'private',
    changed: [],
    unchanged: [range(0, 16)],
    freedBytes: 0,
    contentBy: 'none',
    conversion: 'attributes',
  });
  t.equal(vm.attributes.privateBytes, 16 * P);
  t.same(await convert(0, 16, 'shared'), {
    to: 'shared',
    changed: [range(0, 16)],
    unchanged: [],
    freedBytes: 8 * P,
    contentBy: 'none',
    conversion: 'attributes',
  });
  t.same([memory.residentBytes(), file.residentBytes()], [0, 0], 'nothing is held, let alone twice');
});

await bothWays('pins: EAGAIN until they are let go', async (t, convert, { vm, memory, file, P, range }) => {
  memory.bytes().fill(1);
  const [pin, second] = [file.pin({ offset: 5 * P + 10, size: 3 }), file.pin({ offset: 3 * P, size: 4 * P })];
  const error = await rejection(convert(0, 16, 'private', { chunkSize: P }));
  t.match(error, { code: 'EAGAIN', errno: -11, errorOffset: 3 * P });
  t.match(error.message, /pinned/);
  t.equal(vm.attributes.privateBytes, 0);
  t.equal(memory.residentBytes(), 16 * P, 'nothing changed meanwhile');
  second[Symbol.dispose]();
  t.equal((await rejection(convert(0, 16, 'private'))).errorOffset, 5 * P + 10);
  await convert(0, 5, 'private');
  await convert(6, 10, 'private');
  t.same(vm.attributes.privateRanges(), [range(0, 5), range(6, 10)], 'what is not pinned converts');
  pin[Symbol.dispose]();
  t.match(await convert(0, 16, 'private'), { changed: [range(5, 1)] });
  using held = file.pin({ offset: 0, size: 16 * P });
  t.match(await convert(0, 16, 'private'), { changed: [] }, 'a no-op is none even when pinned');
  await convert(0, 8, 'shared');
  t.equal(vm.attributes.state(range(0, 8)), 'shared', 'to shared always succeeds');
  t.ok(held);
});

await bothWays('a pin is seen before anything is touched', async (t, convert, { vm, memory, file, P }) => {
  file.allocate();
  const view = vm.memory.view(0, P);
  using pin = file.pin({ offset: 15 * P, size: P });
  let chunks = 0;
  const options: ConvertOptions = {
    chunkSize: P,
    content: 'zero',
    onProgress: () => {
      chunks++;
    },
  };
  t.equal((await rejection(convert(0, 16, 'private', options))).code, 'EAGAIN');
  t.same([chunks, view.length, file.residentBytes(), memory.closed], [0, P, 16 * P, false]);
  t.ok(pin);
});

await bothWays('a pin that comes in the middle stops it', async (t, convert, { vm, memory, file, P }) => {
  memory.bytes().fill(1);
  let pin: Disposable | undefined;
  const onProgress = () => {
    pin ??= file.pin({ offset: 9 * P, size: P });
  };
  t.match(await rejection(convert(0, 16, 'private', { chunkSize: P, onProgress })), {
    code: 'EAGAIN',
    errorOffset: 9 * P,
  });
  t.same([vm.attributes.privateBytes, memory.residentBytes()], [0, 16 * P]);
  pin?.[Symbol.dispose]();
});

await bothWays('views on what becomes private are detached', async (t, convert, { vm, P }) => {
  const [within, across] = [vm.memory.view(4 * P, P), vm.memory.view(7 * P, 2 * P)];
  await convert(4, 4, 'private');
  t.same([within.length, across.length], [0, 0]);
  await convert(0, 16, 'shared');
  const view = vm.memory.view(4 * P, P);
  await convert(0, 16, 'shared');
  t.equal(view.length, P, 'a conversion to shared takes nothing away');
});

await bothWays('whatever fails, all is as it was', async (t, convert, { vm, memory, file, P, range }) => {
  memory.bytes().fill(1);
  vm.setMemoryAttributes(range(6, 3), { private: true });
  file.allocate(range2offset(range(6, 3)));
  const before = [...vm.attributes];
  for (let failing = 1; failing < 13; failing++) {
    const problem = new Error(`chunk ${failing}`);
    let chunks = 0;
    const onProgress = () => {
      if (++chunks === failing) throw problem;
    };
    t.equal(await rejection(convert(0, 16, 'private', { chunkSize: P, onProgress })), problem);
    t.same([...vm.attributes], before);
    t.equal(memory.residentBytes(), 16 * P, 'nothing was given back');
    t.equal(file.residentBytes(), 3 * P);
    t.equal(memory.bytes()[0], 1);
  }
  t.match(await convert(0, 16, 'private'), { freedBytes: 13 * P });
});

function range2offset({ address, size }: GuestRange) {
  return { offset: address, size };
}

await bothWays('an abort is seen before each chunk', async (t, convert, { vm, memory, P }) => {
  memory.bytes().fill(1);
  for (let chunk = 0; chunk < 16; chunk++) {
    const controller = new AbortController();
    const reason = new Error('enough');
    if (chunk === 0) controller.abort(reason);
    const onProgress = (done: number) => done === chunk * P && controller.abort(reason);
    t.equal(
      await rejection(
        convert(0, 16, 'private', { chunkSize: P, signal: controller.signal, onProgress: onProgress as () => void }),
      ),
      reason,
    );
    t.same([...vm.attributes], []);
    t.equal(memory.residentBytes(), 16 * P);
  }
  const controller = new AbortController();
  const onProgress = (done: number) => {
    if (done === 16 * P) controller.abort();
  };
  await convert(0, 16, 'private', { chunkSize: P, signal: controller.signal, onProgress });
  t.equal(vm.attributes.privateBytes, 16 * P, 'after the last chunk it is too late');
});

await bothWays('progress counts what is as wanted', async (t, convert, { vm, P, range }) => {
  vm.setMemoryAttributes(range(4, 4), { private: true });
  const seen: [number, number][] = [];
  await convert(0, 12, 'private', { chunkSize: 3 * P, onProgress: (done, total) => seen.push([done / P, total / P]) });
  t.same(seen, [
    [7, 12],
    [8, 12],
    [11, 12],
    [12, 12],
  ]);
  for (const chunkSize of [P + 1, P - 1, 0, 1.5])
    t.equal((await rejection(convert(0, 1, 'shared', { chunkSize }))).code, 'ERR_OUT_OF_RANGE');
  await convert(0, 16, 'shared', { chunkSize: 2 ** 40 });
});

await bothWays('content', async (t, convert, { vm, memory, file, P }) => {
  memory.bytes().fill(1);
  file.allocate();
  t.match(await convert(0, 4, 'private', { content: 'zero' }), { contentBy: 'kernel', freedBytes: 4 * P });
  t.equal(file.residentBytes({ offset: 0, size: 4 * P }), 0, 'what the private side held in an earlier life is gone');
  vm.setMemoryAttributes({ address: 4 * P, size: 4 * P }, { private: true });
  await convert(4, 2, 'shared', { content: 'zero' });
  t.equal(
    vm.memory.read(4 * P, 2 * P).some((byte) => byte !== 0),
    false,
  );
  await convert(6, 2, 'shared');
  t.equal(vm.memory.read(6 * P, 1)[0], 1, 'unspecified: here, what was left');
  const error = await rejection(convert(8, 1, 'private', { content: 'preserve' }));
  t.equal(error.code, 'UNSUPPORTED');
  t.match(error.message, /slot 0.*two memories/);
  t.equal(vm.attributes.at(8 * P), 'shared');
  t.match(await convert(8, 1, 'shared', { content: 'preserve' }), { contentBy: 'none', changed: [] });
});

await withPrivate(t, 'one memory for both sides keeps its content', async (t, { vm, P }) => {
  const file = vm.createGuestMemfd({ size: 4 * P, mmap: true });
  vm.createMemslot({ address: 0, size: 4 * P, guestMemfd: file });
  file.allocate();
  const range = { address: 0, size: 2 * P };
  t.match(await vm.convert(range, 'private', { content: 'preserve' }), {
    freedBytes: 0,
    contentBy: 'kernel',
    conversion: 'attributes',
  });
  t.equal(file.residentBytes(), 4 * P);
  t.match(await vm.convert(range, 'shared'), { freedBytes: 0, contentBy: 'none', conversion: 'attributes' });
  t.equal(file.residentBytes(), 4 * P);
  t.match(await vm.convert(range, 'private', { content: 'zero' }), { contentBy: 'kernel', conversion: 'attributes' });
  t.equal(file.residentBytes(), 2 * P, 'zero gives it back all the same');
});

await withPrivate(t, 'holes, and slots without a guest_memfd', async (t, { backend, vm, P, host, closed }) => {
  const [memory, file] = [host(4), closed(4)];
  vm.createMemslot({ address: 2 * P, size: 2 * P, hostMemory: memory, guestMemfd: file });
  vm.createMemslot({
    address: 8 * P,
    size: 2 * P,
    hostMemory: memory,
    hostOffset: 2 * P,
    guestMemfd: file,
    guestMemfdOffset: 2 * P,
  });
  memory.bytes().fill(1);
  const bare = vm.createMemslot({ slot: 11, address: 12 * P, size: P, hostMemory: host(1) });
  const error = await rejection(vm.convert({ address: 0, size: 13 * P }, 'private'));
  t.equal(error.code, 'EINVAL');
  t.match(error.message, /slot 11 .*no guest_memfd/);
  t.same([...vm.attributes], []);
  bare.remove();
  const report = await vm.convert({ address: 0, size: 16 * P }, 'private', { chunkSize: 3 * P });
  t.match(report, { changed: [{ address: 0, size: 16 * P }], freedBytes: 4 * P });
  t.equal(vm.attributes.state({ address: 0, size: 16 * P }), 'private', 'holes get the attribute');
  vm.createMemslot({ slot: 11, address: 12 * P, size: P, hostMemory: host(1) });
  t.match(await vm.convert({ address: 12 * P, size: P }, 'private'), { changed: [] }, 'private already');
  await vm.convert({ address: 12 * P, size: P }, 'shared');
  // Real KVM has an entry for each page.
  const size = backend.model ? 2 ** 45 : 2 ** 20;
  await vm.convert({ address: 2 ** 50, size }, 'private', { chunkSize: size });
  t.equal(vm.attributes.privateBytes, 15 * P + size, 'cost is by ranges');
});

await bothWays('arguments', async (t, convert, { vm, P }) => {
  const code = async (promise: Promise<unknown>) => (await rejection(promise)).code;
  t.equal(await code(convert(0.5, 1, 'private')), 'ERR_OUT_OF_RANGE');
  t.equal(await code(convert(0, 1.5, 'private')), 'ERR_OUT_OF_RANGE');
  t.equal(await code(convert(0, 0, 'private')), 'ERR_OUT_OF_RANGE');
  t.equal(await code(convert(0, 1, 'secret' as 'private')), 'ERR_OUT_OF_RANGE');
  t.equal(await code(convert(0, 1, 'private', { content: 'keep' as 'zero' })), 'ERR_OUT_OF_RANGE');
  t.equal(await code(convert(0, 1, 'private', { signal: {} as AbortSignal })), 'ERR_INVALID_ARG_TYPE');
  t.equal(await code(convert(0, 1, 'private', { onProgress: 1 as never })), 'ERR_INVALID_ARG_TYPE');
  t.equal(await code(convert(0, 1, 'private', null as never)), 'ERR_INVALID_ARG_TYPE');
  t.equal(vm.attributes.privateBytes, 0);
  vm.close();
  t.equal(await code(convert(0, P, 'private')), 'ERR_CLOSED');
});

await everywhere(t, 'a VM without private memory', async (t, { backend, vm, P, host }) => {
  vm.createMemslot({ address: 0, size: 2 * P, hostMemory: host(2) });
  const range = { address: 0, size: 2 * P };
  const refusal = backend.hasPrivate ? "{ type: 'sw-protected' }" : 'no VM type with private memory';
  refused(t, () => vm.convertSync(range, 'private'), 'UNSUPPORTED', "'default'", 'KVM_CAP_MEMORY_ATTRIBUTES', refusal);
  t.equal((await rejection(vm.convert(range, 'private'))).code, 'UNSUPPORTED');
  for (const report of [vm.convertSync(range, 'shared'), await vm.convert(range, 'shared', { content: 'preserve' })])
    t.same(report, {
      to: 'shared',
      changed: [],
      unchanged: [range],
      freedBytes: 0,
      contentBy: 'none',
      conversion: 'none',
    });
});

await withPrivate(t, 'conversions of one VM take place one after the other', async (t, { vm, P, host, closed }) => {
  const [memory, file] = [host(16), closed(16)];
  const slot = vm.createMemslot({ address: 0, size: 16 * P, hostMemory: memory, guestMemfd: file });
  memory.bytes().fill(1);
  const order: string[] = [];
  const convert = (to: Visibility, from: number, size: number) =>
    vm.convert({ address: from * P, size: size * P }, to, { chunkSize: P, onProgress: () => order.push(to) });
  const all = [convert('private', 0, 16), convert('shared', 4, 4), convert('private', 6, 1)];
  const busy: Record<string, () => unknown> = {
    convertSync: () => vm.convertSync({ address: 15 * P, size: 2 * P }, 'shared'),
    setMemoryAttributes: () => vm.setMemoryAttributes({ address: 0, size: P }, { private: false }),
    move: () => slot.move(32 * P),
    remove: () => slot.remove(),
    'file dispose': () => file[Symbol.dispose](),
    'memory dispose': () => memory[Symbol.dispose](),
  };
  for (const [name, call] of Object.entries(busy)) {
    const error = errorOf(call);
    t.equal(error.code, 'EBUSY', name);
    t.match(error.message, /conversion .* at work/);
  }
  vm.setMemoryAttributes({ address: 16 * P, size: P }, { private: true });
  t.pass('elsewhere is free');
  const reports = await Promise.all(all);
  t.same(
    reports.map(({ freedBytes }) => freedBytes / P),
    [16, 0, 0],
  );
  t.same(order, [...Array(16).fill('private'), ...Array(4).fill('shared'), 'private']);
  t.same(
    vm.attributes.privateRanges({ address: 0, size: 16 * P }).map(({ address, size }) => [address / P, size / P]),
    [
      [0, 4],
      [6, 1],
      [8, 8],
    ],
  );
  slot.remove();
  t.pass('and when they are over the slot can go');
});

await withPrivate(t, 'a conversion that fails does not stop the next', async (t, { vm, P, host, closed }) => {
  const file = closed(4);
  vm.createMemslot({ address: 0, size: 4 * P, hostMemory: host(4), guestMemfd: file });
  const pin = file.pin({ offset: 0, size: P });
  const failing = rejection(vm.convert({ address: 0, size: 4 * P }, 'private'));
  const next = vm.convert({ address: P, size: P }, 'private');
  t.equal((await failing).code, 'EAGAIN');
  t.equal((await next).changed.length, 1);
  pin[Symbol.dispose]();
  vm.convertSync({ address: 0, size: 4 * P }, 'private');
  t.equal(vm.attributes.privateBytes, 4 * P, 'nothing stays busy');
});

await withPrivate(t, 'closing in the middle', async (t, { kvm, P }) => {
  for (const content of ['unspecified', 'zero'] as const) {
    for (let ticks = 0; ticks < 12; ticks++) {
      const vm = kvm.createVm({ type: 'sw-protected' });
      const memory = kvm.createHostMemory({ size: 4 * P });
      const file = vm.createGuestMemfd({ size: 4 * P });
      vm.createMemslot({ address: 0, size: 2 * P, hostMemory: memory, guestMemfd: file });
      vm.createMemslot({
        address: 2 * P,
        size: 2 * P,
        hostMemory: memory,
        hostOffset: 2 * P,
        guestMemfd: file,
        guestMemfdOffset: 2 * P,
      });
      memory.bytes().fill(1);
      file.allocate();
      const result = vm
        .convert({ address: 0, size: 4 * P }, 'private', { chunkSize: P, content })
        .catch((error) => error.code);
      for (let tick = 0; tick < ticks; tick++) await null;
      vm.close();
      memory.close();
      // What takes the numbers of the closed ones must not notice.
      const heirs = {
        vm: kvm.createVm({ type: 'sw-protected' }),
        memory: kvm.createHostMemory({ size: 4 * P }),
      };
      const heir = heirs.vm.createGuestMemfd({ size: 4 * P });
      heirs.memory.bytes().fill(2);
      heir.allocate();
      const outcome = await result;
      t.ok(outcome === 'ERR_CLOSED' || outcome?.freedBytes === 4 * P, `${content}, after ${ticks} ticks`);
      t.same(
        [heirs.vm.attributes.privateBytes, heirs.memory.residentBytes(), heir.residentBytes()],
        [0, 4 * P, 4 * P],
        'others are left alone',
      );
      heirs.vm.close();
      heirs.memory.close();
    }
  }
});

await withPrivate(t, 'what a progress callback may do', async (t, { vm, P, host, closed }) => {
  const [memory, file] = [host(4), closed(4)];
  const slot = vm.createMemslot({ address: 0, size: 4 * P, hostMemory: memory, guestMemfd: file });
  const codes: string[] = [];
  const attempt = (call: () => unknown) => codes.push(errorOf(call).code);
  const onProgress = () => {
    attempt(() => slot.remove());
    attempt(() => vm.convertSync({ address: 0, size: P }, 'shared'));
    attempt(() => memory.close());
    vm.setMemoryAttributes({ address: 64 * P, size: P }, { private: true });
  };
  vm.convertSync({ address: 0, size: 4 * P }, 'private', { onProgress });
  await vm.convert({ address: 0, size: 4 * P }, 'shared', { onProgress });
  t.same(codes, ['EBUSY', 'EBUSY', 'EBUSY', 'EBUSY', 'EBUSY', 'EBUSY']);
  let inner: Promise<ConversionReport> | undefined;
  const start = () => {
    inner ??= vm.convert({ address: 0, size: P }, 'shared');
  };
  await vm.convert({ address: 0, size: 4 * P }, 'private', { onProgress: start });
  t.equal((await inner)?.changed.length, 1, 'one that was started meanwhile comes after');
  refused(
    t,
    () => vm.convertSync({ address: 0, size: 4 * P }, 'private', { onProgress: () => vm.close() }),
    'ERR_CLOSED',
  );
  t.equal(vm.closed, true);
});

// ── a property: any program, against a model that knows nothing but pages

const PAGES = 12;
const P = 4096;

interface Piece {
  readonly slot: number;
  readonly at: number;
  readonly pages: number;
  readonly host: number | null;
  readonly gmem: number | null;
}

interface Conversion {
  do: 'convert';
  at: number;
  pages: number;
  to: Visibility;
  chunk: number;
  content: 'unspecified' | 'zero' | 'preserve';
  sync: boolean;
  /** What goes wrong, in which chunk; nothing at 0. */
  stop: 'throw' | 'abort' | 'veto' | 'kernel';
  failAt: number;
}

type Operation =
  | Conversion
  | { do: 'both'; first: Conversion; second: Conversion }
  | { do: 'fault'; at: number; to: Visibility }
  | { do: 'hold'; at: number; pages: number }
  | { do: 'release' }
  | { do: 'view'; at: number }
  | { do: 'attributes'; at: number; pages: number; secret: boolean }
  | { do: 'allocate' | 'punch' | 'discard' | 'pin'; at: number; pages: number }
  | { do: 'touch'; at: number }
  | { do: 'write'; at: number }
  | { do: 'unpin' }
  | { do: 'slot'; at: number; pages: number; kind: 'pair' | 'host' | 'gmem' }
  | { do: 'remove'; at: number };

const at = fc.nat(PAGES - 1);
const pages = fc.integer({ min: 1, max: PAGES });
const to = fc.constantFrom<Visibility>('private', 'shared');
const conversion: fc.Arbitrary<Conversion> = fc.record({
  do: fc.constant('convert' as const),
  at,
  pages,
  to,
  chunk: fc.integer({ min: 1, max: 5 }),
  content: fc.constantFrom('unspecified' as const, 'unspecified' as const, 'zero' as const, 'preserve' as const),
  sync: fc.boolean(),
  stop: fc.constantFrom('throw' as const, 'abort' as const, 'veto' as const, 'kernel' as const),
  failAt: fc.oneof(fc.constant(0), fc.integer({ min: 0, max: 6 })),
});
/** What goes wrong must be this one's and not the other's. */
const async = conversion.map(
  (one): Conversion => ({ ...one, sync: false, stop: one.stop === 'abort' ? 'abort' : 'throw' }),
);
const operation: fc.Arbitrary<Operation> = fc.oneof(
  { weight: 4, arbitrary: conversion },
  fc.record({ do: fc.constant('both' as const), first: async, second: async }),
  fc.record({ do: fc.constant('fault' as const), at, to }),
  fc.record({ do: fc.constant('hold' as const), at, pages: fc.integer({ min: 1, max: 3 }) }),
  fc.constant({ do: 'release' as const }),
  fc.record({ do: fc.constant('view' as const), at }),
  fc.record({ do: fc.constant('attributes' as const), at, pages, secret: fc.boolean() }),
  {
    weight: 3,
    arbitrary: fc.record({ do: fc.constantFrom('allocate' as const, 'punch' as const, 'discard' as const), at, pages }),
  },
  fc.record({ do: fc.constant('pin' as const), at, pages: fc.integer({ min: 1, max: 3 }) }),
  fc.constant({ do: 'unpin' as const }),
  { weight: 3, arbitrary: fc.record({ do: fc.constantFrom('touch' as const, 'write' as const), at }) },
  fc.record({
    do: fc.constant('slot' as const),
    at,
    pages,
    kind: fc.constantFrom('pair' as const, 'host' as const, 'gmem' as const),
  }),
  fc.record({ do: fc.constant('remove' as const), at }),
);

/** Guest page n lies at page n of the host memory and of the file, so that no two slots share a page. */
class Model {
  readonly secret = new Set<number>();
  readonly host = new Set<number>();
  readonly gmem = new Set<number>();
  readonly slots: Piece[] = [];
  readonly pins: [number, number][] = [];
  readonly holds: [number, number][] = [];
  next = 0;

  piece(page: number): Piece | undefined {
    return this.slots.find(({ at, pages }) => page >= at && page < at + pages);
  }

  pinned(page: number): boolean {
    return this.pins.some(([from, to]) => page >= from && page < to);
  }

  held(page: number): boolean {
    return this.holds.some(([from, to]) => page >= from && page < to);
  }
}

const span = (from: number, to: number) => Array.from({ length: Math.max(0, to - from) }, (_, index) => from + index);
const ranges = (list: readonly number[]) => {
  const found: GuestRange[] = [];
  for (const page of list) {
    const last = found.at(-1);
    if (last && last.address + last.size === page * P)
      found[found.length - 1] = { address: last.address, size: last.size + P };
    else found.push({ address: page * P, size: P });
  }
  return found;
};
const end = (operation: { at: number; pages: number }) => Math.min(PAGES, operation.at + operation.pages);

class Program {
  readonly #failing = new FailingKernel();
  readonly #kvm = this.#failing.kvm;
  readonly vm = this.#kvm.createVm({ type: 'sw-protected' });
  readonly memory = this.#kvm.createHostMemory({ size: PAGES * P });
  readonly file = this.vm.createGuestMemfd({ size: PAGES * P });
  readonly pins: Disposable[] = [];
  readonly holds: MemoryHold[] = [];
  readonly views: [number, Uint8Array][] = [];
  readonly model = new Model();
  readonly #policy = new ConversionPolicy(this.vm);
  #veto = false;
  readonly #user = this.vm.addMemoryUser({ name: 'device', converting: () => (this.#veto ? 'no' : undefined) });

  async run(operation: Operation): Promise<void> {
    const { vm, memory, file, model } = this;
    switch (operation.do) {
      case 'convert':
        return this.#check(operation, await this.#start(operation));
      case 'both': {
        const { first, second } = operation;
        const [one, two] = await Promise.all([this.#start(first), this.#start(second)]);
        this.#check(first, one);
        this.#check(second, two);
        return;
      }
      case 'fault':
        return this.#fault(operation);
      case 'hold': {
        const list = span(operation.at, end(operation));
        const sides = new Set(list.map((page) => model.secret.has(page)));
        const hold = () => this.#user.hold({ address: operation.at * P, size: list.length * P });
        if (!list.every((page) => model.piece(page))) same(errorOf(hold).code, 'EFAULT');
        else if (sides.size > 1) same(errorOf(hold).code, 'EINVAL');
        else {
          this.holds.push(hold());
          model.holds.push([operation.at, end(operation)]);
        }
        return;
      }
      case 'release':
        this.holds.shift()?.release();
        model.holds.shift();
        return;
      case 'view': {
        const slot = model.piece(operation.at);
        const view = () => vm.memory.view(operation.at * P, P);
        if (!slot || slot.host === null || model.secret.has(operation.at)) same(errorOf(view).code, 'EFAULT');
        else this.views.push([operation.at, view()]);
        return;
      }
      case 'attributes': {
        const list = span(operation.at, end(operation));
        vm.setMemoryAttributes({ address: operation.at * P, size: list.length * P }, { private: operation.secret });
        for (const page of list) operation.secret ? model.secret.add(page) : model.secret.delete(page);
        return;
      }
      case 'allocate':
      case 'punch':
      case 'discard': {
        const range = { offset: operation.at * P, size: (end(operation) - operation.at) * P };
        if (operation.do === 'allocate') file.allocate(range);
        else if (operation.do === 'punch') file.punchHole(range);
        else memory.discard(range);
        for (const page of span(operation.at, end(operation))) {
          if (operation.do === 'allocate') model.gmem.add(page);
          else (operation.do === 'punch' ? model.gmem : model.host).delete(page);
        }
        return;
      }
      case 'pin':
        this.pins.push(file.pin({ offset: operation.at * P, size: (end(operation) - operation.at) * P }));
        model.pins.push([operation.at, end(operation)]);
        return;
      case 'unpin':
        this.pins.shift()?.[Symbol.dispose]();
        model.pins.shift();
        return;
      case 'touch':
        memory.bytes({ offset: operation.at * P, size: P })[5] = 1;
        model.host.add(operation.at);
        return;
      case 'write': {
        const slot = model.piece(operation.at);
        const write = () => vm.memory.write(operation.at * P, Uint8Array.of(1));
        if (!slot || slot.host === null || model.secret.has(operation.at)) same(errorOf(write).code, 'EFAULT');
        else {
          write();
          model.host.add(operation.at);
        }
        return;
      }
      case 'slot': {
        const { at, kind } = operation;
        if (span(at, end(operation)).some((page) => model.piece(page))) return;
        const { slot } = vm.createMemslot({
          slot: model.next++,
          address: at * P,
          size: (end(operation) - at) * P,
          ...(kind === 'gmem' ? {} : { hostMemory: memory, hostOffset: at * P }),
          ...(kind === 'host' ? {} : { guestMemfd: file, guestMemfdOffset: at * P }),
        });
        model.slots.push({
          slot,
          at,
          pages: end(operation) - at,
          host: kind === 'gmem' ? null : at,
          gmem: kind === 'host' ? null : at,
        });
        return;
      }
      case 'remove': {
        const slot = model.piece(operation.at);
        if (!slot) return;
        vm.memslots.get(slot.slot)?.remove();
        model.slots.splice(model.slots.indexOf(slot), 1);
      }
    }
  }

  async #start({ at, to, content, chunk, sync, stop, failAt, ...rest }: Conversion): Promise<Outcome> {
    const { vm } = this;
    const failing = this.#failing;
    let seen = 0;
    const abort = new AbortController();
    const onProgress = () => {
      if (++seen !== failAt) return;
      if (stop === 'throw') throw problem;
      if (stop === 'abort') abort.abort(problem);
    };
    const range = { address: at * P, size: (end({ at, ...rest }) - at) * P };
    const options: ConvertOptions = { chunkSize: chunk * P, content, onProgress, signal: abort.signal };
    failing.calls.length = 0;
    failing.only = 'setMemoryAttributes';
    failing.failAt = stop === 'kernel' ? failAt - 1 : -1;
    this.#veto = stop === 'veto' && failAt > 0;
    try {
      return sync ? vm.convertSync(range, to, options) : await vm.convert(range, to, options);
    } catch (error) {
      return error as KvmError;
    } finally {
      failing.failAt = -1;
      this.#veto = false;
    }
  }

  /** A guest that touches a page the other way. */
  #fault({ at, to }: { at: number; to: Visibility }): void {
    const { secret, host, gmem } = this.model;
    const changes = secret.has(at) !== (to === 'private');
    const refused = this.#refusal([at], [at], { to, content: 'unspecified' });
    const exit = { reason: 'memory-fault', address: at * P, size: P, visibility: to, repeats: 1 };
    same(this.#policy.handle(exit as MemoryFaultExit), changes && !refused ? 'resume' : 'stop');
    if (!changes || refused) return;
    const piece = this.model.piece(at);
    if (to === 'private') {
      secret.add(at);
      if (piece && piece.host !== null) host.delete(at);
    } else {
      secret.delete(at);
      if (piece && piece.gmem !== null) gmem.delete(at);
    }
  }

  /** Why a conversion is refused: one reason after the other, as the docstring has them. */
  #refusal(
    list: readonly number[],
    changing: readonly number[],
    { to, content, veto = false }: { to: Visibility; content: Conversion['content']; veto?: boolean },
  ): string | null {
    const { model } = this;
    if (changing.length === 0) return null;
    if (content === 'preserve' && list.some((page) => model.piece(page))) return 'UNSUPPORTED';
    const appearing = to === 'private' ? ('gmem' as const) : ('host' as const);
    if (changing.some((page) => model.piece(page)?.[appearing] === null)) return 'EINVAL';
    if (veto || changing.some((page) => model.held(page))) return 'EAGAIN';
    if (to === 'private' && changing.some((page) => model.piece(page) && model.pinned(page))) return 'EAGAIN';
    return null;
  }

  #check(operation: Conversion, outcome: Outcome): void {
    const { model } = this;
    const { to, content, stop, failAt } = operation;
    const list = span(operation.at, end(operation));
    const changing = list.filter((page) => model.secret.has(page) !== (to === 'private'));
    const chunks = ranges(changing).reduce((sum, { size }) => sum + Math.ceil(size / (operation.chunk * P)), 0);
    const veto = stop === 'veto' && failAt > 0;
    const code = this.#refusal(list, changing, { to, content, veto });
    if (code) {
      same((outcome as Error & { code?: string }).code, code);
      if (code === 'EAGAIN' && !veto) {
        const page = ((outcome as { errorOffset?: number }).errorOffset ?? -1) / P;
        same(changing.includes(page) && (model.held(page) || model.pinned(page)), true);
      }
      return;
    }
    const mine = (set: Set<number>, side: 'host' | 'gmem') =>
      changing.filter((page) => set.has(page) && model.piece(page)?.[side] != null);
    // A zeroed side is empty before the guest can see it.
    if (content === 'zero') {
      const target = to === 'private' ? ('gmem' as const) : ('host' as const);
      for (const page of mine(model[target], target)) model[target].delete(page);
    }
    // An abort is seen before the next chunk.
    if (failAt > 0 && failAt <= (stop === 'abort' ? chunks - 1 : chunks)) {
      if (stop === 'kernel') same((outcome as KvmError).code, 'ENOMEM');
      else same(outcome, problem);
      return;
    }
    const other = to === 'private' ? ('host' as const) : ('gmem' as const);
    const freed = mine(model[other], other);
    for (const page of freed) model[other].delete(page);
    for (const page of changing) to === 'private' ? model.secret.add(page) : model.secret.delete(page);
    same(outcome, {
      to,
      changed: ranges(changing),
      unchanged: ranges(list.filter((page) => !changing.includes(page))),
      freedBytes: freed.length * P,
      contentBy: content === 'unspecified' || changing.length === 0 ? 'none' : 'kernel',
      conversion: 'attributes',
    });
    for (const page of changing) {
      const slot = model.piece(page);
      if (!slot || slot.host === null || slot.gmem === null) continue;
      const held = [this.memory, this.file].filter((one) => one.residentBytes({ offset: page * P, size: P }) > 0);
      same(held.length <= 1, true);
    }
  }

  verify(): void {
    const { vm, memory, file, model } = this;
    same(vm.attributes.privateRanges(), ranges([...model.secret].sort((a, b) => a - b)));
    same(vm.attributes.privateBytes, model.secret.size * P);
    for (const page of span(0, PAGES)) {
      same(vm.attributes.at(page * P) === 'private', model.secret.has(page));
      same(memory.residentBytes({ offset: page * P, size: P }) > 0, model.host.has(page));
      same(file.residentBytes({ offset: page * P, size: P }) > 0, model.gmem.has(page));
    }
    for (const [page, view] of this.views) same(view.length > 0 && model.secret.has(page), false);
    same(vm.memslots.size, model.slots.length);
  }

  close(): void {
    this.#kvm.close();
  }
}

type Outcome = ConversionReport | KvmError;
const problem = new Error('stop');

function same(got: unknown, expected: unknown): void {
  const [a, b] = [got, expected].map((value) => JSON.stringify(value));
  if (got !== expected && a !== b) throw new Error(`expected ${b}, got ${got instanceof Error ? got.stack : a}`);
}

if (onSoftware)
  await t.test('any program does what it does to single pages', async (t) => {
    const runs = Number(process.env.GUEST_MEMFD_RUNS ?? 400);
    await fc.assert(
      fc.asyncProperty(fc.array(operation, { maxLength: 30 }), async (operations) => {
        const program = new Program();
        try {
          program.vm.createMemslot({
            slot: 99,
            address: 0,
            size: 6 * P,
            hostMemory: program.memory,
            guestMemfd: program.file,
          });
          program.model.slots.push({ slot: 99, at: 0, pages: 6, host: 0, gmem: 0 });
          for (const operation of operations) {
            await program.run(operation);
            program.verify();
          }
        } finally {
          program.close();
        }
      }),
      { numRuns: runs },
    );
    t.pass(`${runs} programs`);
  });
