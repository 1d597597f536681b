import { linuxKernel } from '../../lib/kernel/index.ts';
import { childPrograms } from './child_programs.ts';
import type { FdKind } from './scenario.ts';

// A process that inherits fds from number 3 on and runs one program on them. Arguments: its name, then the kind of each fd.
const [name, ...kinds] = process.argv.slice(2) as [string, ...FdKind[]];
const program = childPrograms.find((each) => each.name === name);
if (!program) throw new Error(`no child program ${name}`);
const kernel = linuxKernel();
const fds = kinds.map((kind, index) => {
  const fd = 3 + index;
  const result = kernel.adopt(fd, kind === 'vcpu' ? 'file' : kind);
  if (result < 0) throw new Error(`cannot adopt fd ${fd}: ${result}`);
  return fd;
});
process.stdout.write(JSON.stringify(program(kernel, fds)));
