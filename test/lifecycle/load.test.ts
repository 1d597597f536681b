import t from 'tap';
import { backendNames } from '../backends.ts';
import { times } from '../pace.ts';
import { child, concurrently } from './child_process.ts';

// Many of everything: threads that end with everything open, and cycles of creating and closing. GUEST_MEMFD_CYCLES sets how many cycles.

const MiB = 1 << 20;

t.test('threads that end in every way leave nothing', async (t) => {
  await concurrently(backendNames, async (backend) => {
    const count = backend === backendNames[0] ? times(100) : 30;
    const { code, signal, output, errors } = await child('workers', backend, String(count));
    t.same({ code, signal }, { code: 0, signal: null }, `${backend}: ${errors.slice(0, 1000)}`);
    const { ended, before, after } = JSON.parse(output) as {
      ended: Record<string, Record<string, number>>;
      before: object;
      after: object;
    };
    const each = count / 10;
    t.same(
      ended,
      {
        leave: { 0: 2 * each },
        exit: { 3: each },
        busy: { 1: 3 * each },
        close: { 0: each },
        throw: { 1: each },
        waiting: { 1: 2 * each },
      },
      backend,
    );
    t.same(after, before, `${backend}: files and mappings are as before`);
  });
});

t.test('creating and closing, over and over', async (t) => {
  const cycles = process.env.GUEST_MEMFD_CYCLES ?? String(times(2000, 40));
  await concurrently(backendNames, async (backend) => {
    const { code, signal, output, errors } = await child('cycles', backend, cycles);
    t.same({ code, signal }, { code: 0, signal: null }, `${backend}: ${errors.slice(0, 1000)}`);
    type Held = { fds: number; mappings: number; rss: number };
    const { early, late, milliseconds } = JSON.parse(output) as { early: Held; late: Held; milliseconds: number };
    t.comment(
      `${backend}: ${cycles} cycles in ${milliseconds} ms, RSS ${early.rss / MiB} MiB, then ${late.rss / MiB} MiB`,
    );
    t.ok(late.fds <= early.fds, `${backend}: ${early.fds} files, then ${late.fds}`);
    // The JavaScript heap is mapped piece by piece while it warms up; what leaked would be one mapping, or one page, in each cycle.
    t.ok(late.mappings < early.mappings + 300, `${backend}: ${early.mappings} mappings, then ${late.mappings}`);
    t.ok(late.rss < early.rss + 96 * MiB, `${backend}: RSS ${early.rss}, then ${late.rss}`);
  });
});
