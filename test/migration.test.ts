// Live migration over a byte stream: pre-copy by the dirty log, post-copy by a pager, and both.
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import net from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Duplex, PassThrough } from 'node:stream';
import t from 'tap';
import {
  GuestAgent,
  MiB,
  type MigrationProgress,
  type MigrationReport,
  receiveMemory,
  sendMemory,
  servePages,
} from '../lib/index.ts';
import { backends, everywhere, refused, rejection, type World } from './backends.ts';
import { child } from './lifecycle/child_process.ts';

const folder = mkdtempSync(join(tmpdir(), 'guest-memfd-'));
t.teardown(() => rmSync(folder, { recursive: true }));
let sockets = 0;
const socketPath = (): string => join(folder, `${++sockets}.sock`);
const text = (bytes: Uint8Array): string => Buffer.from(bytes).toString();
/** A thread takes a second to start under the test runner. */
const some = backends.filter(({ name }) => !/aarch64|6\.18/.test(name));

/** Both ends of a connection. */
async function pair(): Promise<[net.Socket, net.Socket]> {
  const path = socketPath();
  const server = net.createServer().listen(path);
  await once(server, 'listening');
  const [near, [far]] = [net.connect(path), (await once(server, 'connection')) as [net.Socket]];
  server.close();
  return [near, far];
}

function source({ kvm, vm, P }: World): GuestAgent {
  const [first, second] = [2 * MiB, MiB].map((size) => kvm.createHostMemory({ size, kind: 'memfd' }));
  vm.createMemslot({ slot: 2, address: 0, size: MiB, hostMemory: first as never, hostOffset: MiB });
  vm.createMemslot({ slot: 5, address: 4 * MiB, size: MiB, hostMemory: second as never });
  const agent = GuestAgent.boot(vm, { address: 0 });
  for (let page = 64; page < MiB / P; page += 3) vm.memory.write(page * P, Buffer.from(`page ${page}`));
  vm.memory.write(4 * MiB, Buffer.from('high'));
  return agent;
}

t.test('pre-copy', async (t) => {
  await everywhere(t, 'seed 3.9: what is written meanwhile is sent again', async (t, world) => {
    const { vm, P, backend } = world;
    const agent = source(world);
    using other = backend.open();
    const [near, far] = await pair();
    const progress: MigrationProgress[] = [];
    let writes = 0;
    const [report, taken] = await Promise.all([
      sendMemory(vm, near, {
        enough: 0,
        rounds: 4,
        onProgress: (step) => {
          progress.push(step);
          // In the first rounds the guest and the host go on.
          if (step.round > 2) return;
          agent.write(4 * MiB + P, Buffer.from(`guest ${++writes}`.padEnd(10)));
          vm.memory.write(4 * MiB + 3 * P, Buffer.from(`host ${writes}`.padEnd(10)));
        },
        prepare: () => {
          agent.write(4 * MiB + 2 * P, Buffer.from('last words'));
          agent.close();
          return Buffer.from('registers');
        },
      }),
      receiveMemory(other, far),
    ]);
    t.equal(text(taken.data), 'registers');
    t.same(taken.pagers, []);
    t.ok(report.rounds.length >= 3, `${report.rounds}`);
    t.equal(
      report.rounds.reduce((sum, round) => sum + round, 0),
      report.sentBytes,
    );
    t.equal(report.missingBytes, 0);
    t.ok((report.rounds.at(-1) ?? 0) < (report.rounds[0] ?? 0), 'the pause sends less than the first round');
    t.equal(progress.at(-1)?.sentBytes, report.sentBytes);
    t.ok(writes > 1);
    t.equal(text(taken.vm.memory.read(4 * MiB + P, 10)).trim(), `guest ${writes}`);
    t.equal(text(taken.vm.memory.read(4 * MiB + 3 * P, 10)).trim(), `host ${writes}`);
    t.equal(text(taken.vm.memory.read(4 * MiB + 2 * P, 10)), 'last words');
    t.same([...taken.vm.memslots.keys()], [2, 5]);
    for (const [address, size] of [
      [0, MiB],
      [4 * MiB, MiB],
    ] as const)
      t.ok(Buffer.from(taken.vm.memory.read(address, size)).equals(vm.memory.read(address, size)), `all at ${address}`);
    refused(t, () => vm.memory.write(0, Uint8Array.of(1)), 'EPERM');
    vm.close();
    using there = GuestAgent.boot(taken.vm, { address: 0 });
    t.equal(text(there.read(4 * MiB + 2 * P, 10)), 'last words', 'the guest finds it');
    near.destroy();
    far.destroy();
  });

  await everywhere(t, 'seed 3.9: the other side is lost, or it is cancelled: the VM goes on', async (t, world) => {
    const { vm, P, backend } = world;
    const agent = source(world);
    using other = backend.open();
    const [near, far] = await pair();
    const received = rejection(receiveMemory(other, far));
    let steps = 0;
    const sent = rejection(
      sendMemory(vm, near, {
        onProgress: () => {
          if (++steps === 2) far.destroy();
        },
      }),
    );
    t.equal((await received).code, 'EPIPE');
    t.equal((await sent).code, 'EPIPE');
    t.equal(vm.frozen, false);
    agent.write(P * 40, Buffer.from('goes on'));
    t.notOk([...vm.memslots.values()].some(({ logDirtyPages }) => logDirtyPages));

    const [again, there] = await pair();
    const cancel = new AbortController();
    const late = rejection(receiveMemory(other, there));
    const prepare = (): undefined => cancel.abort(new Error('not today')) as undefined;
    t.equal((await rejection(sendMemory(vm, again, { prepare, signal: cancel.signal }))).message, 'not today');
    t.equal((await late).code, 'EPIPE');
    t.equal(vm.frozen, false);
    t.equal(text(vm.memory.read(P * 40, 7)), 'goes on');
    for (const stream of [near, far, again, there]) stream.destroy();
  });

  await everywhere(t, 'what is no migration is refused', async (t, world) => {
    const { vm, kvm, P } = world;
    const hostile: Record<string, Uint8Array> = {
      'no frame': Buffer.from('GET / HTTP/1.1\r\n\r\n'),
      'a frame that is too long': new Uint8Array([1, 0, 0, 0, 255, 255, 255, 255]),
      'no JSON': new Uint8Array([1, 0, 0, 0, 1, 0, 0, 0, 65]),
      'no image': Buffer.concat([new Uint8Array([1, 0, 0, 0, 2, 0, 0, 0]), Buffer.from('{}')]),
      'another frame': new Uint8Array([2, 0, 0, 0, 0, 0, 0, 0]),
    };
    for (const [what, bytes] of Object.entries(hostile)) {
      const stream: Duplex = new PassThrough();
      stream.write(bytes);
      t.equal((await rejection(receiveMemory(kvm, stream))).code, 'EINVAL', what);
      stream.destroy();
    }
    const stream = new PassThrough();
    stream.end(new Uint8Array([6, 0, 0, 0, 16, 0, 0, 0, ...new Uint8Array(16).fill(9)]));
    t.equal((await rejection(servePages(vm, stream))).code, 'EINVAL', 'a question for what is not there');
    const file = vm.createGuestMemfd({ size: P, mmap: true, initShared: true });
    vm.createMemslot({ address: 0, size: P, guestMemfd: file });
    t.match(await rejection(sendMemory(vm, new PassThrough())), { code: 'UNSUPPORTED', message: /log/ });
  });
});

t.test('post-copy', async (t) => {
  for (const how of ['pure', 'hybrid'] as const) {
    await everywhere(
      t,
      `seed 3.9: a guest runs here while its pages are in another process: ${how}`,
      async (t, { kvm, P }) => {
        const [path, pagesPath] = [socketPath(), socketPath()];
        const server = net.createServer().listen(path);
        await once(server, 'listening');
        const ended = child('migration_child', kvm.backend, path, pagesPath, how);
        const [stream] = (await once(server, 'connection')) as [net.Socket];
        const { vm, data, pagers } = await receiveMemory(kvm, stream, { pages: { path: pagesPath } });
        t.equal(text(data), 'registers');
        t.equal(pagers.length, 1);
        const agent = GuestAgent.boot(vm, { address: 0 });
        t.equal(text(agent.read(3 * MiB, 10)), 'last words');
        t.equal(text(agent.read(2 * MiB, 18)), 'the guest was here');
        agent.write(3 * MiB + 7 * P, Buffer.from('new'));
        await pagers[0]?.done;
        t.ok((pagers[0]?.progress.totalBytes ?? 0) > 0);
        if (how === 'hybrid') t.ok((pagers[0]?.progress.totalBytes ?? 0) < MiB, 'the most came before');
        let wrong = 0;
        for (let at = MiB; at < 4 * MiB; at += P) {
          const expected =
            { [2 * MiB]: 'the guest', [3 * MiB]: 'last words', [3 * MiB + 7 * P]: 'new' }[at] ?? `page ${at}`;
          if (text(vm.memory.read(at, expected.length)) !== expected) wrong++;
        }
        t.equal(wrong, 0);
        for (const pager of pagers) pager.close();
        stream.destroy();
        server.close();
        const { code, output, errors } = await ended;
        t.equal(code, 0, errors);
        const report = JSON.parse(output) as MigrationReport;
        if (how === 'pure') t.equal(report.sentBytes, 0, 'nothing before the guest moved');
        t.equal(report.missingBytes, pagers[0]?.progress.totalBytes);
      },
      some,
    );
  }

  await everywhere(
    t,
    'seed 3.9: the process that has the pages dies',
    async (t, { kvm }) => {
      const [path, pagesPath] = [socketPath(), socketPath()];
      const server = net.createServer().listen(path);
      await once(server, 'listening');
      const ended = child('migration_child', kvm.backend, path, pagesPath, 'dies');
      const [stream] = (await once(server, 'connection')) as [net.Socket];
      const { vm, pagers } = await receiveMemory(kvm, stream, { pages: { path: pagesPath } });
      t.match(await rejection(pagers[0]?.done as Promise<void>), { code: 'EIO' });
      t.throws(() => GuestAgent.boot(vm, { address: 0 }), { code: 'EFAULT' });
      refused(t, () => vm.memory.read(MiB, 1), 'EFAULT');
      stream.destroy();
      server.close();
      t.equal((await ended).code, 3);
    },
    some,
  );
});
