// Post-copy: memory whose pages come when they are touched.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import t from 'tap';
import { type Exit, GuestAgent, type HostMemory, Pager, type PagerOptions, type PagerProgress } from '../lib/index.ts';
import { backends, everywhere, refused, rejection, type World } from './backends.ts';
import { type Plan, pageByte } from './pager_source.ts';

const module = new URL('pager_source.js', import.meta.url);
const PAGES = 192;
const folder = mkdtempSync(join(tmpdir(), 'guest-memfd-'));
t.teardown(() => rmSync(folder, { recursive: true }));

/** A VM whose memory is its own up to a page, for the agent, and has to come from there on. */
function guest({ kvm, vm, P }: World, kind: 'memfd' | 'anonymous' = 'memfd') {
  const own = Math.ceil((128 * 1024) / P) * P;
  const ram = kvm.createHostMemory({ size: own + PAGES * P, kind });
  vm.createMemslot({ address: 0, size: ram.size, hostMemory: ram });
  const exits: Exit[] = [];
  const onExit = (exit: Exit): 'stop' => {
    exits.push(exit);
    return 'stop';
  };
  const agent = GuestAgent.boot(vm, { address: 0, onExit });
  const start = (plan: Partial<Plan> = {}, options: Partial<PagerOptions> = {}): Promise<Pager> =>
    Pager.start(ram, {
      module,
      data: { pageSize: P, ...plan },
      missing: [{ offset: own, size: PAGES * P }],
      ...options,
    });
  return { ram, own, agent, exits, start };
}

const at = (ram: HostMemory, offset: number, P: number): string => `${offset / P} of ${ram.size / P}`;

t.test('pages come when they are touched', async (t) => {
  for (const kind of ['memfd', 'anonymous'] as const) {
    await everywhere(t, `seed 3.9: an access waits for its page: ${kind}`, async (t, world) => {
      const { vm, P } = world;
      const { ram, own, agent, start } = guest(world, kind);
      vm.memory.write(own + 5 * P, Buffer.from('what was there goes'));
      const resident = ram.residentBytes();
      using pager = await start({}, { prefetch: false });
      t.equal(pager.memory, ram);
      t.ok(ram.residentBytes() < resident);
      const device = vm.addMemoryUser({ name: 'device' });
      t.equal(device.hold({ address: own, size: PAGES * P }).visibility, 'shared', 'to a device it is all there');
      for (const page of [5, 0, PAGES - 1])
        t.equal(agent.read(own + page * P + 7, 1)[0], pageByte(own + page * P, P), `the guest finds page ${page}`);
      t.equal(vm.memory.read(own + 9 * P, 2)[1], pageByte(own + 9 * P, P), 'so does the host');
      vm.memory.write(own + 11 * P + 1, Uint8Array.of(7));
      agent.write(own + 12 * P + 1, Uint8Array.of(8));
      t.same([...vm.memory.read(own + 11 * P, 2)], [pageByte(own + 11 * P, P), 7], 'a write finds the page first');
      t.same([...agent.read(own + 12 * P, 2)], [pageByte(own + 12 * P, P), 8], 'also the guest’s');
      while (pager.progress.faults < 6) await wait(1);
      const { totalBytes, presentBytes, faults } = pager.progress;
      t.equal(totalBytes, PAGES * P);
      t.equal(presentBytes, 6 * P, 'nobody fetched more than was touched');
      t.equal(faults, 6);
      refused(t, () => ram.bytes(), 'EBUSY', 'view');
      refused(t, () => vm.memory.view(0, P), 'EBUSY', 'view');
      t.equal((await rejection(start())).code, 'EBUSY');
      agent.touch({ address: own, size: PAGES * P });
      await pager.done;
      t.same(pager.progress, { totalBytes, presentBytes: totalBytes, faults: PAGES });
      t.equal(ram.bytes()[own + 20 * P], pageByte(own + 20 * P, P), 'a view, now that all is there');
      t.equal(ram.bytes()[own + 12 * P + 1], 8);
    });
  }

  await everywhere(t, 'seed 3.9: the others come in the background, with progress', async (t, world) => {
    const { vm, P } = world;
    const { ram, own, agent, start } = guest(world);
    const seen: PagerProgress[] = [];
    const view = ram.bytes({ offset: own, size: P });
    const pager = await start(
      { delay: 1, zerosFrom: own + 100 * P },
      { chunkSize: 8 * P, onProgress: (progress) => seen.push(progress) },
    );
    t.equal(view.length, 0, 'views from before are detached');
    t.equal(agent.read(own + 90 * P, 1)[0], pageByte(own + 90 * P, P));
    agent.write(own + 91 * P, Uint8Array.of(99));
    await pager.done;
    t.ok(seen.length >= PAGES / 8 / 2, `${seen.length} steps`);
    t.ok(seen.every(({ presentBytes }, index) => index === 0 || presentBytes > (seen[index - 1]?.presentBytes ?? 0)));
    t.equal(seen.at(-1)?.presentBytes, PAGES * P);
    for (let page = 0; page < PAGES; page++) {
      const byte = page === 91 ? 99 : page >= 100 ? 0 : pageByte(own + page * P, P);
      if (vm.memory.read(own + page * P, 1)[0] !== byte) t.fail(`page ${page}`);
    }
    pager.close();
    pager.close();
    t.equal(ram.bytes()[own], pageByte(own, P), at(ram, own, P));
  });
});

/** A thread takes a second to start under the test runner. */
const some = backends.filter(({ name }) => !/aarch64|6\.18/.test(name));

t.test('a source that fails', async (t) => {
  for (const failure of ['throw', 'exit', 'short', 'nothing'] as const) {
    await everywhere(
      t,
      `seed 3.9: it ends the guest's wait with a typed exit: ${failure}`,
      async (t, world) => {
        const { vm, P } = world;
        const { ram, own, agent, exits, start } = guest(world);
        using pager = await start({ failAt: own + 40 * P, failure }, { prefetch: false });
        t.equal(agent.read(own + 39 * P, 1)[0], pageByte(own + 39 * P, P));
        const error = refused(t, () => agent.read(own + 50 * P, 1), 'EIO', 'source');
        t.equal(error.errorOffset, own + 50 * P);
        t.match(await rejection(pager.done), { code: 'EIO', errorOffset: own + 50 * P });
        t.match(exits, [{ reason: 'page-source-failed', address: own + 50 * P, size: P, error: { code: 'EIO' } }]);
        t.equal(vm.memory.read(own + 39 * P, 1)[0], pageByte(own + 39 * P, P), 'what has come stays');
        refused(t, () => vm.memory.read(own + 51 * P, 1), 'EFAULT');
        refused(t, () => ram.bytes(), 'EIO');
      },
      failure === 'throw' ? backends : some,
    );
  }

  await everywhere(t, 'seed 3.9: a pager that is closed early', async (t, world) => {
    const { vm, P } = world;
    const { own, agent, start } = guest(world);
    const pager = await start({}, { prefetch: false });
    t.equal(agent.read(own, 1)[0], pageByte(own, P));
    pager.close();
    t.equal((await rejection(pager.done)).code, 'ERR_CLOSED');
    refused(t, () => vm.memory.read(own + P, 1), 'EFAULT');
    t.match(refused(t, () => agent.read(own + P, 1), 'EIO').cause, { code: 'ERR_CLOSED' });
  });

  await everywhere(
    t,
    'seed 3.9: a source that cannot be set up changes nothing',
    async (t, world) => {
      const { kvm, vm, P } = world;
      const { ram, own, start } = guest(world);
      vm.memory.write(own, Buffer.from('stays'));
      t.match(await rejection(start({ setupFails: true })), { message: /no source here/ });
      t.equal(Buffer.from(ram.bytes({ offset: own, size: 5 })).toString(), 'stays');
      const nowhere = new URL('nowhere.js', import.meta.url);
      t.match(await rejection(start({}, { module: nowhere })), { message: /nowhere/ });
      t.equal((await rejection(start({}, { chunkSize: P + 1 }))).code, 'ERR_OUT_OF_RANGE');
      t.equal((await rejection(start({}, { missing: [{ offset: 1, size: P }] }))).code, 'ERR_OUT_OF_RANGE');
      const file = kvm.createHostMemory({ size: P, kind: 'file', path: join(folder, 'file') });
      t.equal((await rejection(Pager.start(file, { module }))).code, 'UNSUPPORTED');
      file.close();
      using pager = await start();
      await pager.done;
      t.equal(ram.bytes()[own], pageByte(own, P));
    },
    some,
  );
});
