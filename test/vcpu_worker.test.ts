// A VM on several threads: Vm.attach, and a vCPU on a worker of its own.
import { once } from 'node:events';
import { setTimeout as pause } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import t, { type Test } from 'tap';
import { type Exit, Kvm, type KvmError, MiB, VcpuWorker, type VcpuWorkerOptions, Vm } from '../lib/index.ts';
import { JournalReader, JournalWriter } from '../lib/vm_journal.ts';
import {
  type Backend,
  backends,
  codeBackends,
  everywhere,
  openFiles,
  refused,
  rejection,
  type World,
} from './backends.ts';
import type { Plan } from './vcpu_worker_module.ts';

const onRealKvm = backends.filter(({ name }) => name === 'kvm');
const module = new URL('vcpu_worker_module.js', import.meta.url);
const ENTRY = 0x1000;
const DEVICE = 0xe000_0000;

/** Reads a byte of a device, adds one, writes it back; for ever. */
const echo = {
  // in al, 0x10; inc al; out 0x10, al; jmp to the start
  x86_64: Uint8Array.of(0xe4, 0x10, 0xfe, 0xc0, 0xe6, 0x10, 0xeb, 0xf8),
  // ldrb w0, [x1]; add w0, w0, #1; strb w0, [x1]; b to the start
  aarch64: new Uint8Array(Uint32Array.of(0x39400020, 0x11000400, 0x39000020, 0x17fffffd).buffer),
};
const endless = {
  x86_64: Uint8Array.of(0xeb, 0xfe),
  aarch64: new Uint8Array(Uint32Array.of(0x14000000).buffer),
};

// ── Vm.attach

async function attached(
  t: Test,
  world: World,
  run: (ask: (name: string, ...args: number[]) => Promise<unknown>, worker: Worker) => Promise<void>,
): Promise<void> {
  const worker = new Worker(new URL('attached_vm.js', import.meta.url), { workerData: world.vm.handle });
  const exited = once(worker, 'exit');
  const ask = async (name: string, ...args: number[]): Promise<unknown> => {
    worker.postMessage([name, ...args]);
    const [answer] = await once(worker, 'message');
    return answer;
  };
  try {
    await run(ask, worker);
    await ask('close');
  } catch (error) {
    await worker.terminate();
    throw error;
  }
  const [code] = await exited;
  t.equal(code, 0);
}

t.test('another thread sees the memory of a VM as it changes', async (t) => {
  await everywhere(
    t,
    'memory',
    async (t, world) => {
      const { vm, kvm, P } = world;
      const ram = world.host(4);
      vm.createMemslot({ address: 0, size: 4 * P, hostMemory: ram });
      vm.memory.write(P, Uint8Array.of(7));
      await attached(t, world, async (ask) => {
        t.same(await ask('kvm'), ['kvm', P, 'default']);
        t.equal(await ask('capability'), vm.checkExtension('NR_MEMSLOTS'));
        const first = { slot: 0, address: 0, size: 4 * P, host: 'anonymous', file: null, readonly: false };
        t.same(await ask('slots'), [first]);
        t.same(await ask('read', P, 1), [7]);
        await ask('write', P, 8);
        t.same([...vm.memory.read(P, 1)], [8], 'anonymous memory is one for all threads');
        t.equal(await ask('hostBytes', 0, P), 8);

        const file = world.shared(2);
        const second = vm.createMemslot({ address: 64 * P, size: 2 * P, guestMemfd: file });
        vm.memory.write(64 * P, Uint8Array.of(9));
        t.same(await ask('read', 64 * P, 1), [9], 'a slot that came later');
        t.equal(await ask('resident', 1), file.residentBytes());
        t.equal(await ask('view', 64 * P, P), 9);
        const [host, size] = [await ask('slots'), 2 * P];
        t.same(host, [first, { slot: 1, address: 64 * P, size, host: null, file: size, readonly: false }]);

        second.remove();
        t.equal(await ask('viewed'), 0, 'a view of a slot that is gone is detached');
        t.equal(await ask('read', 64 * P, 1), 'EFAULT');
        t.same(await ask('slots'), [first]);
        file.close();

        const moving = vm.createMemslot({ address: 128 * P, size: P, hostMemory: ram, hostOffset: P });
        t.same(await ask('read', 128 * P, 1), [8]);
        moving.move(256 * P);
        t.equal(await ask('read', 128 * P, 1), 'EFAULT');
        t.same(await ask('read', 256 * P, 1), [8]);
        // More changes than the journal keeps.
        for (let round = 0; round < 1500; round++) moving.move(((round % 7) + 10) * P);
        t.same(await ask('read', (1499 % 7) * P + 10 * P, 1), [8]);
        moving.remove();
      });
      t.equal(vm.closed, false);
      t.same([...kvm.createVm().memslots], []);
    },
    onRealKvm,
  );
});

t.test('another thread sees attributes', async (t) => {
  for (const backend of onRealKvm.filter(({ hasPrivate }) => hasPrivate)) {
    using kvm = backend.open();
    const vm = kvm.createVm({ type: 'sw-protected' });
    const P = kvm.pageSize;
    const world = { vm, kvm, P } as World;
    const hostMemory = kvm.createHostMemory({ size: 4 * P });
    vm.createMemslot({ address: 0, size: 4 * P, hostMemory, guestMemfd: vm.createGuestMemfd({ size: 4 * P }) });
    await attached(t, world, async (ask) => {
      t.equal(await ask('view', P, P), 0);
      await vm.convert({ address: P, size: P }, 'private');
      t.equal(await ask('state', 0, 4 * P), 'mixed');
      t.equal(await ask('viewed'), 0, 'the view of what became private is detached');
      t.equal(await ask('read', P, 1), 'EFAULT');
      vm.convertSync({ address: P, size: P }, 'shared');
      t.equal(await ask('state', 0, 4 * P), 'shared');
      t.same(await ask('read', P, 1), [0]);
    });
  }
});

t.test('memory is changed where the VM was created', async (t) => {
  await everywhere(
    t,
    'refusals',
    async (t, world) => {
      const { vm, P } = world;
      const slot = vm.createMemslot({ address: 0, size: P, hostMemory: world.host(1) });
      await attached(t, world, async (ask) => {
        const codes = (await ask('refusals')) as string[];
        t.same(codes, [...Array(9).fill('UNSUPPORTED'), 'EBUSY']);
        t.equal(slot.removed, false);
        t.equal(await ask('vcpu'), 0);
        t.equal(vm.createVcpu().id, 1, 'numbers that other threads took are left out');
        t.equal(await ask('vcpu'), 2);
      });
      t.equal(vm.memslots.size, 1);
    },
    onRealKvm,
  );
});

t.test('a VM closed by its thread is closed for the others', async (t) => {
  await everywhere(
    t,
    'close',
    async (t, world) => {
      const { vm, P } = world;
      const ram = world.host(1);
      vm.createMemslot({ address: 0, size: P, hostMemory: ram });
      const { handle } = vm;
      await attached(t, world, async (ask) => {
        t.equal(await ask('closed'), false);
        vm.close();
        ram.close();
        t.equal(await ask('closed'), true);
        t.equal(await ask('read', 0, 1), 'ERR_CLOSED');
      });
      refused(t, () => Vm.attach(handle), 'ERR_CLOSED');
      refused(t, () => vm.handle, 'ERR_CLOSED');
    },
    onRealKvm,
  );
});

t.test('a VM attached on its own thread', async (t) => {
  await everywhere(
    t,
    'same thread',
    async (t, world) => {
      const { vm, P } = world;
      vm.createMemslot({ address: 0, size: P, hostMemory: world.host(1) });
      const again = Vm.attach(vm.handle);
      t.equal(again.memslots.size, 1);
      again.close();
      await attached(t, world, async (ask) => {
        t.equal(((await ask('slots')) as object[]).length, 1);
      });
    },
    onRealKvm,
  );
});

t.test('what is no handle is refused', async (t) => {
  const journal = new SharedArrayBuffer(4096);
  const handle = { kvm: 1, vm: 1, type: 'default', journal } as const;
  for (const wrong of [undefined, null, 1, 'handle', {}, { ...handle, journal: new ArrayBuffer(64) }])
    refused(t, () => Vm.attach(wrong as never), 'ERR_INVALID_ARG_TYPE');
  for (const size of [0, 4, 17])
    refused(t, () => Vm.attach({ ...handle, journal: new SharedArrayBuffer(size) }), 'ERR_INVALID_ARG_TYPE');
  for (const kvm of [-1, 0.5, Number.NaN, 2 ** 53]) refused(t, () => Vm.attach({ ...handle, kvm }), 'ERR_OUT_OF_RANGE');
  refused(t, () => Vm.attach({ ...handle, type: 'other' as never }), 'ERR_OUT_OF_RANGE');
  for (const backend of onRealKvm) {
    refused(t, () => Vm.attach(handle), 'ERR_CLOSED');
    using kvm = backend.open();
    const vm = kvm.createVm();
    const real = vm.handle;
    refused(t, () => Vm.attach({ ...real, vm: 3 }), 'ERR_CLOSED');
    t.same(vm.handle, real, 'a handle is the same each time');
    // A journal that somebody made up reaches nothing.
    const words = new Float64Array(journal, 16);
    new Int32Array(journal).set([2, 2 ** 31 - 1]);
    for (let at = 0; at + 9 <= words.length; at += 9) words.set([at % 5, 12345, 2 ** 60, -1, 12345, Number.NaN], at);
    const vmOfLies = Vm.attach({ ...real, journal });
    t.same([...vmOfLies.memslots], []);
    refused(t, () => vmOfLies.memory.read(0, 1), 'EFAULT');
    vmOfLies.close();
    t.equal(vm.closed, false);
  }
  using kvm = Kvm.open({ backend: 'software' });
  refused(t, () => kvm.createVm().handle, 'UNSUPPORTED', 'software kernel');
});

t.test('a journal tells everything, however long it is', async (t) => {
  const privateGfns = new Map<number, true>();
  const source = {
    slots: new Map(),
    *privateGfns() {
      for (const start of privateGfns.keys()) yield { start, end: start + 1, value: true as const };
    },
    shareOf: () => 1,
  };
  const writer = new JournalWriter(source as never);
  const reader = new JournalReader(writer.buffer);
  const late = new JournalReader(writer.buffer);
  const seen = new Set<number>();
  const read = (from: JournalReader, into: Set<number>): void => {
    const news = from.changes();
    if (news?.anew) into.clear();
    for (const change of news?.changes ?? []) {
      if (change.kind !== 'attributes') continue;
      if (change.isPrivate) into.add(change.start);
      else into.delete(change.start);
    }
  };
  for (let round = 0; round < 50_000; round++) {
    const gfn = (round * 7919) % 4999;
    const isPrivate = !privateGfns.has(gfn);
    if (isPrivate) privateGfns.set(gfn, true);
    else privateGfns.delete(gfn);
    writer.attributes(gfn, gfn + 1, isPrivate);
    if (round % 97 === 0) read(reader, seen);
  }
  read(reader, seen);
  const all = new Set<number>();
  read(late, all);
  t.same([...seen].sort(), [...privateGfns.keys()].sort());
  t.same([...all].sort(), [...privateGfns.keys()].sort());
  t.equal(reader.changes(), null);
  t.ok(writer.buffer.byteLength < 72 * 4 * 5000, 'and is not much longer than what there is to tell');
});

// ── VcpuWorker

async function withWorker(
  t: Test,
  title: string,
  code: Readonly<Record<'x86_64' | 'aarch64', Uint8Array>>,
  mode: Plan['mode'],
  run: (t: Test, worker: VcpuWorker, world: World, backend: Backend) => Promise<void>,
  given: VcpuWorkerOptions = {},
): Promise<void> {
  await everywhere(
    t,
    title,
    async (t, world) => {
      const { vm, kvm, backend } = world;
      vm.createMemslot({ address: 0, size: MiB, hostMemory: kvm.createHostMemory({ size: MiB }) });
      vm.memory.write(ENTRY, code[kvm.arch]);
      const data: Plan = { entry: ENTRY, device: DEVICE, mode };
      const worker = await VcpuWorker.start(vm, { module, data, ...given });
      await run(t, worker, world, backend);
      worker.close();
      await worker.ended;
    },
    codeBackends,
  );
}

const isInput = (exit: Exit): boolean =>
  exit.reason === 'io' ? exit.direction === 'in' : exit.reason === 'mmio' && !exit.isWrite;
const dataOf = (exit: Exit): Uint8Array => {
  if (exit.reason !== 'io' && exit.reason !== 'mmio') throw new Error(`an exit of reason ${exit.reason}`);
  return exit.data;
};

t.test('exits come to the owner, and its answers to the guest', async (t) => {
  await withWorker(t, 'echo', echo, 'pass', async (t, worker) => {
    t.equal(worker.id, 0);
    for (let round = 0; round < 20; round++) {
      const input = await worker.next();
      t.ok(isInput(input));
      dataOf(input)[0] = 10 * round;
      const output = await worker.next();
      t.notOk(isInput(output));
      t.equal(dataOf(output)[0], 10 * round + 1);
    }
  });
});

t.test('what the module deals with stays on its thread', async (t) => {
  await withWorker(t, 'module', echo, 'odd stays', async (t, worker) => {
    let [inputs, outputs] = [0, 0];
    for await (const exit of worker) {
      if (isInput(exit)) dataOf(exit)[0] = inputs++;
      else t.equal((dataOf(exit)[0] as number) & 1, 0, `output ${outputs++}`);
      if (inputs === 20) break;
    }
    t.equal(outputs, 9);
    t.equal(worker.closed, false, 'leaving the loop closes nothing');
  });
});

t.test('exits whose bytes were given away, and modules that talk', async (t) => {
  await withWorker(t, 'transfer', echo, 'talk', async (t, worker) => {
    const input = dataOf(await worker.next());
    structuredClone(input.buffer, { transfer: [input.buffer as ArrayBuffer] });
    t.notOk(isInput(await worker.next()));
    t.ok(isInput(await worker.next()));
  });
});

t.test('a run ends when it is kicked, and when its time is over', async (t) => {
  await withWorker(t, 'kick', endless, 'pass', async (t, worker, _world, { model }) => {
    if (!model) {
      const running = worker.next();
      const busy = await rejection(worker.next());
      t.equal(busy.code, 'EBUSY');
      setTimeout(() => worker.kick(), 20);
      t.same(await running, { reason: 'interrupted' });
    }
    worker.kick();
    t.same(await worker.next(), { reason: 'interrupted' }, 'a kick without a run is for the next one');
  });
  const timeout = 30;
  await withWorker(
    t,
    'timeout',
    endless,
    'pass',
    async (t, worker) => {
      t.same(await worker.next(), { reason: 'timeout' });
    },
    { timeout },
  );
});

t.test('a run on another thread keeps memslots from being locked', async (t) => {
  await withWorker(t, 'seed 4.4: a lock', endless, 'pass', async (t, worker, { vm }, { model }) => {
    const [slot] = vm.memslots.values();
    if (!slot) throw new Error('the guest has no memory');
    if (!model) {
      const running = worker.next();
      // The other thread takes its time to begin.
      let error: KvmError | null = null;
      while (!error) {
        try {
          slot.lock('read');
          slot.unlock();
          await pause(1);
        } catch (refusal) {
          error = refusal as KvmError;
        }
      }
      t.match(error, { code: 'EBUSY', message: /a vCPU runs/ });
      worker.kick();
      await running;
    }
    t.equal(slot.lock('read').rights, 'read');
    slot.unlock();
  });
});

t.test('closing ends a run, from either side', async (t) => {
  await withWorker(t, 'worker.close()', endless, 'pass', async (t, worker, { vm }, { model }) => {
    const next = model ? null : rejection(worker.next());
    worker.close();
    if (next) t.equal((await next).code, 'ERR_CLOSED');
    t.equal((await rejection(worker.next())).code, 'ERR_CLOSED');
    await worker.ended;
    t.equal(vm.closed, false);
    t.same([...vm.memory.read(ENTRY, 1)].length, 1);
  });
  await withWorker(t, 'vm.close()', endless, 'pass', async (t, worker, { vm }, { model }) => {
    const next = model ? null : rejection(worker.next());
    vm.close();
    if (next) t.equal((await next).code, 'ERR_CLOSED');
    t.equal(worker.closed, true);
    await worker.ended;
  });
  await withWorker(t, 'a module that never lets go', echo, 'swallow', async (t, worker, _world, { model }) => {
    if (model) return;
    const next = rejection(worker.next());
    worker.close();
    t.equal((await next).code, 'ERR_CLOSED');
    await worker.ended;
  });
  await withWorker(t, 'a loop', echo, 'pass', async (t, worker) => {
    let exits = 0;
    for await (const _ of worker) if (++exits === 5) worker.close();
    t.equal(exits, 5, 'the loop ends with the worker');
  });
});

t.test('a worker that dies does not take the VM with it', async (t) => {
  await withWorker(t, 'exit', echo, 'leave', async (t, worker, { vm, kvm }, { model }) => {
    // On one thread the module would end the program.
    if (model) return;
    t.equal((await rejection(worker.next())).code, 'ERR_CLOSED');
    await worker.ended;
    worker.kick();
    const data: Plan = { entry: ENTRY, device: DEVICE, mode: 'pass' };
    const other = await VcpuWorker.start(vm, { module, data });
    t.equal(other.id, 1);
    // A protected host runs no vCPU that was created after the VM's first run.
    if (kvm.vmTypes.has('protected')) t.equal((await rejection(other.next())).code, 'EINVAL');
    else t.ok(isInput(await other.next()));
    other.close();
    await other.ended;
  });
});

t.test('errors of the module are the owner’s', async (t) => {
  await withWorker(t, 'throw', echo, 'throw', async (t, worker) => {
    await t.rejects(worker.next(), { message: 'thrown by the module' });
  });
  await withWorker(t, 'kvm error', echo, 'kvm error', async (t, worker) => {
    const error: KvmError = await rejection(worker.next());
    t.match(error, { name: 'KvmError', code: 'EBUSY', errno: -16, syscall: 'ioctl', message: 'a KvmError' });
  });
  await everywhere(t, 'start', async (t, { vm }) => {
    const before = openFiles();
    const start = (options: object): Promise<unknown> => VcpuWorker.start(vm, options as VcpuWorkerOptions);
    await t.rejects(start({ module, data: { mode: 'no setup' } }), { message: 'not with me' });
    await t.rejects(start({ module: '/nowhere/module.js' }), /nowhere/);
    await t.rejects(start({ module: new URL('backends.js', import.meta.url) }), /neither setup nor onExit/);
    await t.rejects(start({ module: 7 }), { code: 'ERR_INVALID_ARG_TYPE' });
    await t.rejects(start({ id: -1 }), { code: 'ERR_OUT_OF_RANGE' });
    await t.rejects(start({ timeout: Number.NaN }), { code: 'ERR_OUT_OF_RANGE' });
    await t.rejects(start({ registers: { nonsense: 1n } }), /nonsense/);
    await t.rejects(VcpuWorker.start({} as Vm), { code: 'ERR_INVALID_ARG_TYPE' });
    t.throws(() => new (VcpuWorker as unknown as new () => object)(), { code: 'ERR_INVALID_ARG_TYPE' });
    t.same(openFiles(), before, 'no vCPU is left');
  });
});
