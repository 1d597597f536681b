import { once } from 'node:events';
import net from 'node:net';
import type { FileRange } from '../guest_range.ts';
import type { PageContent } from '../pager/source.ts';
import { FRAME, type Frame, frames, PAGES_HEAD, pagesHead, send, wrong } from './frames.ts';

/** The source of a Pager whose pages servePages() has. */
interface Plan {
  readonly connect: net.NetConnectOpts;
  /** Index in the image. */
  readonly memory: number;
}

let socket: net.Socket;
let answers: AsyncGenerator<Frame, void, void>;
let memory = 0;
/** The server answers one question after the other. */
let last: Promise<unknown> = Promise.resolve();

export async function setup(plan: Plan): Promise<void> {
  memory = plan.memory;
  socket = net.connect(plan.connect);
  await once(socket, 'connect');
  // What happens to it is told to who asks.
  socket.on('error', () => {});
  answers = frames(socket);
}

export async function onMissing(range: FileRange): Promise<PageContent> {
  await send(socket, FRAME.ask, pagesHead(memory, range.offset, range.size));
  const answer = last.then(() => answers.next());
  last = answer.catch(() => {});
  const { value, done } = await answer;
  if (done) throw wrong('it ended early');
  if (value.type === FRAME.zeros) return null;
  if (value.type !== FRAME.pages) throw wrong(`frame ${value.type} is no answer`);
  return value.payload.subarray(PAGES_HEAD);
}
