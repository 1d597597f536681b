import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Duplex, PassThrough } from 'node:stream';
import * as api from '../../lib/index.ts';
import {
  type ConvertOptions,
  GuestMemfd,
  GuestMemory,
  GuestMemoryStore,
  HostMemory,
  Kvm,
  KvmError,
  MemoryAttributes,
  type MemoryUser,
  Memslot,
  StoredMemory,
  type Vcpu,
  Vm,
} from '../../lib/index.ts';
import { openFiles } from '../backends.ts';
import { some } from '../pace.ts';
import { all, Mine } from './bad_values.ts';

// Every method and property of every object, with every bad value in every place. Prints what went wrong, as JSON, and how many calls it made.

const [backendName = 'software', typeName = 'default'] = process.argv.slice(2) as [
  'kvm' | 'software',
  'default' | 'sw-protected',
];

// Bad values are file names too.
const FOLDER = mkdtempSync(join(tmpdir(), 'guest-memfd-'));
const SCRATCH = join(FOLDER, 'scratch');
process.chdir(FOLDER);

interface World {
  readonly kvm: Kvm;
  readonly vm: Vm;
  readonly P: number;
  readonly host: HostMemory;
  readonly file: GuestMemfd;
  readonly slot: Memslot;
  readonly vcpu: Vcpu;
  readonly user: MemoryUser;
  readonly otherVm: Vm;
  readonly otherKvm: Kvm;
  readonly foreignHost: HostMemory;
  readonly foreignFile: GuestMemfd;
  /** Of a file on disk, and all the memory that otherVm has. */
  readonly onDisk: HostMemory;
  /** Opened when it is first asked for. */
  readonly store: GuestMemoryStore;
  readonly stored: StoredMemory;
}

function create(): World {
  const kvm = Kvm.open({ backend: backendName });
  const otherKvm = Kvm.open({ backend: backendName });
  const vm = kvm.createVm({ type: typeName });
  const otherVm = kvm.createVm();
  const P = kvm.pageSize;
  const host = kvm.createHostMemory({ size: 16 * P, kind: 'memfd' });
  const file = vm.createGuestMemfd({ size: 16 * P, mmap: typeName === 'default', initShared: typeName === 'default' });
  const slot = vm.createMemslot({ address: 0, size: 4 * P, hostMemory: host, logDirtyPages: true });
  vm.createMemslot({ address: 16 * P, size: 4 * P, hostMemory: host, hostOffset: 4 * P, guestMemfd: file });
  host.bytes({ offset: 0, size: 2 * P }).fill(1);
  file.allocate({ offset: 0, size: P });
  const onDisk = kvm.createHostMemory({ size: P, kind: 'file', path: SCRATCH });
  otherVm.createMemslot({ address: 1024 * P, size: P, hostMemory: onDisk });
  if (typeName !== 'default') vm.setMemoryAttributes({ address: 17 * P, size: P }, { private: true });
  let store: GuestMemoryStore | undefined;
  const openStore = (): GuestMemoryStore => {
    store ??= kvm.openStore(join(FOLDER, 'store'));
    return store;
  };
  return {
    kvm,
    otherKvm,
    vm,
    otherVm,
    P,
    host,
    file,
    slot,
    vcpu: vm.createVcpu(),
    user: vm.addMemoryUser({ name: 'device' }),
    foreignHost: otherKvm.createHostMemory({ size: 16 * P }),
    foreignFile: otherVm.createGuestMemfd({ size: 16 * P }),
    onDisk,
    get store() {
      return openStore();
    },
    get stored() {
      const own = openStore();
      return own.list().includes('one') ? own.open('one') : own.create('one', { size: 4 * P });
    },
  };
}

let counted = { numbers: '', ours: 0 };
/** Files of ours: Node's own come and go. It is asked often, and looks at what they are when there are others. */
function openCount(): number {
  const numbers = readdirSync('/proc/self/fd').join();
  if (numbers !== counted.numbers) counted = { numbers, ours: openFiles((target) => target.startsWith(FOLDER)).length };
  return counted.ours;
}

/** Everything that a refused call must leave alone. */
function state({ kvm, vm, otherVm, otherKvm, host, file, foreignHost, foreignFile }: World): string {
  const of = (one: Vm) =>
    one.closed ? 'closed' : JSON.stringify([one.describe(), one.attributes.privateRanges(), [...one.memslots.keys()]]);
  const held = [host, file, foreignHost, foreignFile].map((one) => (one.closed ? 'closed' : one.residentBytes()));
  return JSON.stringify([kvm.closed, otherKvm.closed, of(vm), of(otherVm), held, openCount()]);
}

type Arguments = readonly unknown[];
interface Method {
  readonly name: string;
  target(world: World): object;
  /** Arguments that would do. */
  good(world: World): Arguments;
}

const method = <T extends object>(
  target: (world: World) => T,
  name: keyof T & string,
  good: (world: World) => Arguments = () => [],
): Method => ({ name, target, good });
const page = ({ P }: World) => ({ offset: 0, size: P });
const range = ({ P }: World) => ({ address: 16 * P, size: P });
const convertOptions = ({ P }: World): ConvertOptions => ({
  content: 'unspecified',
  chunkSize: 2 ** 18 * P,
  onProgress: () => {},
  retries: 1,
  signal: new AbortController().signal,
});

const methods: readonly Method[] = [
  {
    name: 'open',
    target: () => Kvm,
    good: () => [
      {
        backend: 'software',
        device: '/dev/kvm',
        model: {
          arch: 'x86_64',
          kernel: '7.3',
          pageSize: 4096,
          swProtected: true,
          tdp: true,
          pkvm: false,
          lockLimit: 2 ** 30,
        },
      },
    ],
  },
  method(
    ({ kvm }) => kvm,
    'checkExtension',
    () => [3],
  ),
  method(
    ({ kvm }) => kvm,
    'createVm',
    () => [{ type: 'default', ipaBits: undefined }],
  ),
  method(
    ({ kvm }) => kvm,
    'createHostMemory',
    ({ P }) => [{ size: P, kind: 'anonymous', path: undefined, hugePageSize: undefined, numaNode: 0 }],
  ),
  method(
    ({ kvm }) => kvm,
    'createHostMemory',
    ({ P }) => [{ size: P, kind: 'memfd', numaNode: 0 }],
  ),
  method(
    ({ kvm }) => kvm,
    'createHostMemory',
    ({ P }) => [{ size: P, kind: 'file', path: SCRATCH }],
  ),
  method(
    ({ kvm }) => kvm,
    'createHostMemory',
    ({ P }) => [{ size: P, kind: 'secret' }],
  ),
  method(
    ({ kvm }) => kvm,
    'createHostMemory',
    () => [{ size: 2 ** 21, kind: 'hugetlb', hugePageSize: 2 ** 21 }],
  ),
  method(
    ({ vm }) => vm,
    'memslotAt',
    () => [0],
  ),
  method(
    ({ vm }) => vm,
    'checkExtension',
    () => ['GUEST_MEMFD'],
  ),
  method(
    ({ vm }) => vm,
    'createGuestMemfd',
    ({ P }) => [{ size: P, mmap: false, initShared: false, flags: 0n }],
  ),
  method(
    ({ vm }) => vm,
    'createMemslot',
    ({ P, host, file }) => [
      {
        slot: 9,
        addressSpace: 0,
        address: 64 * P,
        size: P,
        hostMemory: host,
        hostOffset: 0,
        guestMemfd: file,
        guestMemfdOffset: 8 * P,
        readonly: false,
        logDirtyPages: false,
      },
    ],
  ),
  method(
    ({ vm }) => vm,
    'createMemslot',
    ({ P, host }) => [{ address: 64 * P, size: P, hostMemory: host, readonly: true, logDirtyPages: true }],
  ),
  method(
    ({ vm }) => vm,
    'setMemoryAttributes',
    (world) => [range(world), { private: true }],
  ),
  method(
    ({ vm }) => vm,
    'convert',
    (world) => [range(world), 'private', convertOptions(world)],
  ),
  method(
    ({ vm }) => vm,
    'convertSync',
    (world) => [range(world), 'private', convertOptions(world)],
  ),
  method(
    ({ vm }) => vm,
    'convertSync',
    (world) => [range(world), 'shared', convertOptions(world)],
  ),
  method(
    ({ kvm }) => kvm,
    'openStore',
    () => [join(FOLDER, 'another store'), { readOnly: false, data: FOLDER }],
  ),
  method(
    ({ store }) => store,
    'create',
    ({ P, store }) => {
      if (store.list().includes('new')) store.remove('new');
      return ['new', { size: P, tags: { a: 'b' } }];
    },
  ),
  ...(['open', 'remove'] as const).map((name) =>
    method(
      ({ store }) => store,
      name,
      ({ stored }) => [stored.name],
    ),
  ),
  ...(['attach', 'restore'] as const).map((name) =>
    method(
      ({ store }) => store,
      name,
      ({ otherVm, stored }) => [otherVm, stored.name, { users: {} }],
    ),
  ),
  method(
    ({ store }) => store,
    'snapshot',
    ({ store, vm, vcpu }) => {
      if (store.list().includes('copy')) store.remove('copy');
      return [vm, 'copy', { vcpus: [vcpu], tags: {} }];
    },
  ),
  method(({ store }) => store, 'list'),
  method(({ store }) => store, 'close'),
  method(
    ({ stored }) => stored,
    'setTags',
    () => [{ a: 'b' }],
  ),
  method(
    ({ stored }) => stored,
    'record',
    ({ otherVm }) => [otherVm, { vcpus: [] }],
  ),
  ...(['describe', 'extents', 'sync', 'close'] as const).map((name) => method(({ stored }) => stored, name)),
  method(({ vm }) => vm, 'describe'),
  method(({ vm }) => vm, 'unlockAll'),
  method(({ vm }) => vm, 'statistics'),
  method(({ vcpu }) => vcpu, 'statistics'),
  method(
    ({ vm }) => vm,
    'addMemoryUser',
    () => [{ name: 'disk', converting: () => undefined, converted: () => {}, kept: () => {}, discarding: () => {} }],
  ),
  method(
    ({ user }) => user,
    'hold',
    (world) => [range(world)],
  ),
  method(({ user }) => user, 'remove'),
  ...(backendName === 'kvm'
    ? [
        method(
          () => Vm,
          'attach',
          ({ vm }) => [vm.handle],
        ),
      ]
    : []),
  method(
    ({ vm }) => vm,
    'createVcpu',
    () => [7],
  ),
  method(
    ({ vcpu }) => vcpu,
    'setRegisters',
    () => [{ rip: 0n, rax: 1n }],
  ),
  method(({ vcpu }) => vcpu, 'getRegisters'),
  method(
    ({ vcpu }) => vcpu,
    'preFaultMemory',
    (world) => [range(world)],
  ),
  method(({ vcpu }) => vcpu, 'kick'),
  method(({ vcpu }) => vcpu, 'close'),
  method(({ vm }) => vm, 'close'),
  method(({ kvm }) => kvm, 'close'),
  method(
    ({ slot }) => slot,
    'move',
    ({ P }) => [64 * P],
  ),
  method(
    ({ slot }) => slot,
    'setLogDirtyPages',
    () => [false],
  ),
  method(({ slot }) => slot, 'dirtyPages'),
  method(
    ({ slot }) => slot,
    'clearDirtyPages',
    (world) => [page(world)],
  ),
  method(
    ({ slot }) => slot,
    'lock',
    () => ['read'],
  ),
  method(
    ({ vm }) => vm.memslots.get(1) as Memslot,
    'lock',
    () => ['read-write'],
  ),
  method(({ slot }) => slot, 'unlock'),
  method(({ slot }) => slot, 'residentBytes'),
  method(({ slot }) => slot, 'remove'),
  ...(['allocate', 'punchHole', 'bytes', 'residentBytes', 'pin'] as const).map((name) =>
    method(
      ({ file }) => file,
      name,
      (world) => [page(world)],
    ),
  ),
  ...[({ file }: World) => file, ({ host }: World) => host].flatMap((target) => [
    method(target as (world: World) => HostMemory, 'setNumaPolicy', (world) => [
      { mode: 'bind', nodes: [0] },
      page(world),
    ]),
    method(target as (world: World) => HostMemory, 'numaPolicyAt', () => [0]),
  ]),
  method(({ file }) => file, 'close'),
  ...(['discard', 'bytes', 'residentBytes'] as const).map((name) =>
    method(
      ({ host }) => host,
      name,
      (world) => [page(world)],
    ),
  ),
  method(({ host }) => host, 'close'),
  method(
    ({ vm }) => vm.memory,
    'read',
    () => [0, 8],
  ),
  method(
    ({ vm }) => vm.memory,
    'readInto',
    () => [0, new Uint8Array(8)],
  ),
  method(
    ({ vm }) => vm.memory,
    'write',
    () => [0, new Uint8Array(8)],
  ),
  method(
    ({ vm }) => vm.memory,
    'view',
    () => [0, 8],
  ),
  method(
    ({ vm }) => vm.attributes,
    'at',
    () => [0],
  ),
  method(
    ({ vm }) => vm.attributes,
    'state',
    (world) => [range(world)],
  ),
  method(
    ({ vm }) => vm.attributes,
    'privateRanges',
    (world) => [range(world)],
  ),
  method(
    ({ vm }) => vm.memslots as Map<number, Memslot>,
    'get',
    () => [0],
  ),
  // Nobody is at the other end, and none of these waits for somebody: the VM has a guest_memfd, the streams have ended.
  method(
    () => api,
    'handOver',
    ({ vm }) => [vm, { path: LONG_PATH, prepare: () => undefined, signal: new AbortController().signal }],
  ),
  method(
    () => api,
    'takeOver',
    ({ kvm }) => [kvm, { path: LONG_PATH, signal: new AbortController().signal }],
  ),
  method(
    () => api,
    'storeInSystemd',
    ({ vm }) => [vm, { name: 'vm', data: new Uint8Array(8) }],
  ),
  method(
    () => api,
    'takeFromSystemd',
    ({ kvm }) => [kvm, { name: 'vm' }],
  ),
  method(
    () => api,
    'preserveAcrossKexec',
    ({ vm }) => [vm],
  ),
  method(
    () => api.CarveOut,
    'create',
    ({ vm, otherVm, P }) => [otherVm, { address: 1024 * P, size: P }, { to: vm, address: 512 * P }],
  ),
  method(
    () => api.CarveOut,
    'ledger',
    ({ vm }) => [vm],
  ),
  method(
    () => api.Pager,
    'start',
    ({ onDisk, P }) => [
      onDisk,
      {
        module: 'file:///nowhere.js',
        data: 1,
        missing: [{ offset: 0, size: P }],
        prefetch: true,
        chunkSize: 16 * P,
        onProgress: () => {},
      },
    ],
  ),
  method(
    () => api,
    'sendMemory',
    ({ vm }) => [
      vm,
      ended(),
      {
        prepare: () => undefined,
        rounds: 1,
        enough: 1,
        postCopy: true,
        onProgress: () => {},
        signal: new AbortController().signal,
      },
    ],
  ),
  method(
    () => api,
    'servePages',
    ({ vm }) => [vm, ended()],
  ),
  method(
    () => api,
    'receiveMemory',
    ({ kvm }) => [kvm, ended(), { pages: { path: '/nowhere' }, signal: new AbortController().signal }],
  ),
];

/** Those that need no object. */
const statics: readonly object[] = [Kvm, api, api.CarveOut, api.Pager];

/** Longer than the name of a socket can be. */
const LONG_PATH = `/${'long'.repeat(30)}`;

function ended(): Duplex {
  const stream = new PassThrough();
  stream.on('error', () => {});
  stream.end();
  return stream;
}

const problems: string[] = [];
let calls = 0;

function complain(what: string, why: unknown): void {
  if (problems.length < 60) problems.push(`${what}: ${why instanceof Error ? why.stack : String(why)}`);
}

/** An error of ours, with a code; or the caller's own, as that of a Proxy which its handler has left, or of a class as a callback. */
function isTyped(error: unknown): boolean {
  if (error instanceof Mine) return true;
  if (error instanceof TypeError && /proxy that has been revoked|Class constructors cannot/.test(error.message))
    return true;
  const known = error instanceof KvmError || error instanceof TypeError || error instanceof RangeError;
  return known && typeof (error as { code?: unknown }).code === 'string';
}

let world = create();
let before = state(world);
let tested: Method | undefined;

/** What the tested method is about may only now be made, and that is no change. */
function settle(): void {
  tested?.target(world);
  tested?.good(world);
  before = state(world);
}

function renew(): void {
  world.kvm.close();
  world.otherKvm.close();
  world = create();
  settle();
}

/** Calls, and judges the error, if any, and what it left. What succeeded may have changed anything, so a new world follows. */
async function attempt(what: string, call: () => unknown, judge: (error: unknown) => boolean = isTyped): Promise<void> {
  calls++;
  let succeeded = false;
  try {
    const result = await call();
    succeeded = true;
    if (result instanceof Kvm || result instanceof Vm) result.close();
  } catch (error) {
    if (!judge(error)) complain(what, error);
  }
  try {
    if (!succeeded && state(world) !== before) complain(what, `changed ${before} to ${state(world)}`);
    if (succeeded || state(world) !== before) renew();
  } catch (error) {
    complain(`${what}, and then`, error);
    renew();
  }
}

const apply = ({ name }: Method, target: unknown, args: Arguments) =>
  ((target as Record<string, (...args: Arguments) => unknown>)[name] as (...args: Arguments) => unknown).apply(
    target,
    args as unknown[],
  );

/** Something whose properties are read; an object of ours or of Node's is one thing. */
function isOptions(value: unknown): value is object {
  return typeof value === 'object' && value !== null && Object.getPrototypeOf(value) === Object.prototype;
}

async function badArguments(each: Method): Promise<void> {
  const goodArguments = each.good(world);
  for (const [label, make] of Object.entries(all)) {
    for (let index = 0; index < goodArguments.length; index++) {
      await attempt(`${each.name}(argument ${index}: ${label})`, () => {
        const args = [...each.good(world)];
        args[index] = make();
        return apply(each, each.target(world), args);
      });
      const good = goodArguments[index];
      if (!isOptions(good)) continue;
      for (const property of Object.keys(good)) {
        await attempt(`${each.name}(${property}: ${label})`, () => {
          const args = [...each.good(world)];
          args[index] = { ...(args[index] as object), [property]: make() };
          return apply(each, each.target(world), args);
        });
      }
      const inner = (good as { model?: object }).model;
      for (const property of Object.keys(inner ?? {})) {
        await attempt(`${each.name}(model.${property}: ${label})`, () =>
          apply(each, each.target(world), [{ backend: 'software', model: { ...inner, [property]: make() } }]),
        );
      }
    }
  }
}

/** What a getter may do while a call reads its arguments. Each destroys something the call is about to use, and lets another take its numbers. */
const sabotage: Readonly<Record<string, (world: World) => void>> = {
  'closes the VM': ({ vm, kvm }) => {
    vm.close();
    kvm.createVm();
  },
  'closes the Kvm': ({ kvm, otherKvm }) => {
    kvm.close();
    otherKvm.createVm();
  },
  'disposes of the memory': ({ host, kvm, P }) => {
    host[Symbol.dispose]();
    kvm
      .createHostMemory({ size: 16 * P })
      .bytes()
      .fill(9);
  },
  'disposes of the file': ({ file, vm, P }) => {
    file[Symbol.dispose]();
    vm.createGuestMemfd({ size: 16 * P }).allocate();
  },
  'removes the slot': ({ slot, vm, P, foreignHost }) => {
    slot.remove();
    void foreignHost;
    vm.createMemslot({ slot: 0, address: 256 * P, size: P, hostMemory: vm.kvm.createHostMemory({ size: P }) });
  },
};

async function reentrant(each: Method): Promise<void> {
  for (const [label, ruin] of some(Object.entries(sabotage), 5)) {
    const goodArguments = each.good(world);
    for (let index = 0; index < goodArguments.length; index++) {
      const good = goodArguments[index];
      if (!isOptions(good)) continue;
      for (const property of Object.keys(good)) {
        calls++;
        const { kvm, otherKvm } = world;
        const what = `${each.name}(${property} ${label})`;
        const args = [...each.good(world)];
        const value = (args[index] as Record<string, unknown>)[property];
        let after = '';
        args[index] = Object.defineProperty({ ...(args[index] as object) }, property, {
          enumerable: true,
          get: () => {
            if (after === '') {
              ruin(world);
              after = survivors(kvm, otherKvm);
            }
            return value;
          },
        });
        try {
          const result = await apply(each, each.target(world), args);
          if (result instanceof Kvm || result instanceof Vm) result.close();
        } catch (error) {
          if (!isTyped(error)) complain(what, error);
          if (survivors(kvm, otherKvm) !== after) complain(what, `changed ${after} to ${survivors(kvm, otherKvm)}`);
        }
        renew();
      }
    }
  }
}

/** What the process holds: no fd may be added by a call that is refused. */
function survivors(...kvms: Kvm[]): string {
  return JSON.stringify([
    kvms.map(({ closed }) => closed),
    openCount(),
    world.foreignHost.closed || world.foreignHost.residentBytes(),
  ]);
}

/** Methods on something that is not theirs: the engine refuses private names, with a TypeError of its own. */
async function tornOff(each: Method): Promise<void> {
  if (statics.includes(each.target(world))) return;
  const others: Record<string, (world: World) => unknown> = {
    undefined: () => undefined,
    null: () => null,
    'a number': () => 1,
    'an object': () => ({}),
    'its prototype': (world) => Object.getPrototypeOf(each.target(world)),
    'Object.create(prototype)': (world) => Object.create(Object.getPrototypeOf(each.target(world))),
    'Object.create(instance)': (world) => Object.create(each.target(world)),
    'a Proxy': (world) => new Proxy(each.target(world), {}),
    'another class': (world) => (each.target(world) instanceof Vm ? world.host : world.vm),
  };
  const own = (each.target(world) as Record<string, unknown>)[each.name] as (...args: Arguments) => unknown;
  for (const [label, other] of some(Object.entries(others), 5)) {
    await attempt(
      `${each.name} on ${label}`,
      () => own.apply(other(world), each.good(world) as unknown[]),
      (error) => error instanceof TypeError,
    );
  }
}

/** Getters of the prototypes, on something that is not theirs; and properties that a caller overwrites or deletes. */
async function properties(): Promise<void> {
  const classes = [
    ...[Kvm, Vm, Memslot, GuestMemfd, HostMemory, GuestMemory, MemoryAttributes],
    ...[GuestMemoryStore, StoredMemory, api.Pager, api.CarveOut],
  ];
  for (const one of classes) {
    for (
      let prototype = one.prototype as object;
      prototype !== Object.prototype;
      prototype = Object.getPrototypeOf(prototype)
    ) {
      for (const [name, { get }] of Object.entries(Object.getOwnPropertyDescriptors(prototype))) {
        if (!get) continue;
        for (const other of [undefined, null, {}, Object.create(one.prototype), one.prototype])
          await attempt(
            `get ${one.name}.${name}`,
            () => get.call(other),
            (error) => error instanceof TypeError,
          );
      }
    }
    await attempt(`new ${one.name}`, () => new (one as unknown as new () => object)());
    await attempt(`Reflect.construct ${one.name}`, () =>
      Reflect.construct(one as unknown as new () => object, [], Object),
    );
    await attempt(`class extends ${one.name}`, () => new (class extends (one as unknown as new () => object) {})());
  }
  for (const overwrite of [
    ({ host }: World) => Object.assign(host, { size: 2 ** 40 }),
    ({ file }: World) => Object.assign(file, { size: 2 ** 40 }),
    ({ file }: World) => Object.assign(file, { flags: 3n }),
    ({ host }: World) => Object.assign(host, { kind: 'file' }),
    ({ kvm }: World) => Object.assign(kvm, { pageSize: 1 }),
    ({ vm }: World) => Object.assign(vm, { memory: null, attributes: null, type: 'tdx' }),
  ]) {
    const { vm, host, file, P } = world;
    try {
      overwrite(world);
    } catch {}
    for (const call of [
      () => vm.createMemslot({ address: 2 ** 30, size: 32 * P, hostMemory: host }),
      () => vm.createMemslot({ address: 2 ** 31, size: P, hostMemory: host, hostOffset: 20 * P }),
      () => vm.createMemslot({ address: 2 ** 32, size: 32 * P, guestMemfd: file }),
      () => host.bytes({ offset: 0, size: 32 * P }),
      () => host.discard({ offset: 0, size: 32 * P }),
      () => file.allocate({ offset: 0, size: 32 * P }),
    ]) {
      calls++;
      try {
        call();
        complain(`overwritten properties: ${overwrite}, ${call}`, 'went beyond the memory');
      } catch (error) {
        if (!(error instanceof Error)) complain('overwritten properties', error);
      }
    }
    try {
      renew();
    } catch (error) {
      complain(`overwritten properties: ${overwrite}, close`, error);
      world = create();
      settle();
    }
  }
}

for (const each of some(methods, 6)) {
  tested = each;
  settle();
  await badArguments(each);
  await reentrant(each);
  await tornOff(each);
}
await properties();
world.kvm.close();
world.otherKvm.close();
process.chdir('/');
rmSync(FOLDER, { recursive: true });
const left = openFiles();
if (left.length > 0) complain('at the end', `open: ${left}`);
console.log(JSON.stringify({ calls, problems }));
